"""The policy loss: six per-token losses or a user's own, three aggregations, KL to the reference, off-policy correction.

    loss = aggregate(w * L + kl_beta * KL)          L per-token policy loss, w importance weight (`decoupled` only)

Invariants: a step's loss is the sum of its micro-batches' losses (pass `num_tokens`); values at masked positions,
nan and inf included, reach neither loss nor gradient; finite inputs at loss tokens give finite results.

Legend: B = sequences, T = completion tokens (right-padded). lp = policy_logprobs, old = the ratio's denominator,
rho = exp(lp - old), A = advantage, m = loss_mask. Every log-ratio is clamped to +-20. Formulas and sources, and the
glossary of metrics: docs/algorithms.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sluice.common.config.trainer import LossConfig
from sluice.common.loading import find_function

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: far beyond any clip, far from float32 overflow."""
DPPO_PULL = 1e-3
"""Weight of dppo's squared log-ratio (prime-rl's kl_tau)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a per-token loss reads; masked positions hold 0 everywhere. All [B, T]."""

    logprobs: Tensor
    "of the policy being trained; carries the gradient"
    log_ratio: Tensor
    "lp - old, clamped; carries the gradient"
    advantages: Tensor
    "of each token's completion"
    mask: Tensor
    "bool: tokens in the loss"


TokenLoss = Tensor | tuple[Tensor, dict[str, Tensor]]
"""Loss [B, T], and by metric name values [B, T]; the metric is their mean over the loss tokens."""
LossFunction = Callable[[LossConfig, LossInputs], TokenLoss]
"""The formula of one loss: one of `_LOSSES`, or a user's function that `trainer.loss.loss` names."""


def policy_loss(
    config: LossConfig,
    *,
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    ref_logprobs: Tensor | None = None,
    prox_logprobs: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (scalar, differentiable in policy_logprobs alone) and its detached metrics for one micro-batch.

    policy_logprobs, rollout_logprobs, ref_logprobs, prox_logprobs: [B, T], nats; advantages: [B]; loss_mask: [B, T].
    prox_logprobs is read in `decoupled` only; none = the policy as it is now, which is exact for one optimizer step per
    batch (then rho = 1 and no clip acts).

    num_tokens is the normaliser of the *whole optimizer step*, over all its micro-batches and ranks, counted before any
    off-policy masking; with it the losses, and so the gradients, of the micro-batches add up to those of the step:

        token_mean      number of loss tokens                        loss = sum m l / num_tokens
        sequence_mean   number of sequences with a loss token        loss = sum_b (sum_t m l / sum_t m) / num_tokens
        fixed_horizon   the same number of sequences                 loss = sum m l / (num_tokens * horizon)

    `trainer.micro_batches.step_normaliser` counts it. None = this batch is the whole step.

    Metrics: `combine_metrics` makes a step's metrics from those of its micro-batches. A batch without a loss token
    gives loss 0, gradient 0 and metrics 0. Raises ValueError where kl_beta > 0 and ref_logprobs is none, ConfigError where
    `config.loss` names a user's function that cannot be loaded.
    """
    if config.kl_beta > 0 and ref_logprobs is None:
        raise ValueError(f"kl_beta = {config.kl_beta} needs ref_logprobs: send the groups to the reference role")
    # Values at masked positions become 0 by selection, before any arithmetic: nan * 0 would be nan. All but the
    # policy's own logprobs are constants.
    mask = loss_mask.bool()
    logprobs, rollout = _keep(policy_logprobs, mask), _keep(rollout_logprobs, mask).detach()
    prox = (logprobs if prox_logprobs is None else _keep(prox_logprobs, mask)).detach()

    # The ratio's denominator: the sampler (`bypass`), or the policy before the batch's first optimizer step (`decoupled`),
    # whose distance from the sampler is then left to the importance weight. Never both: that would correct twice.
    old = rollout if config.off_policy == "bypass" else prox
    tokens = LossInputs(
        logprobs=logprobs,
        log_ratio=_log_ratio(logprobs, old),
        advantages=_keep(advantages.unsqueeze(-1).expand_as(logprobs), mask),
        mask=mask,
    )
    found = _loss_function(config.loss)(config, tokens)
    token_loss, token_metrics = found if isinstance(found, tuple) else (found, {})
    if token_loss.shape != mask.shape:
        raise ValueError(
            f"loss={config.loss} gave shape {tuple(token_loss.shape)}, not {tuple(mask.shape)}: one loss a token"
        )
    weight = torch.ones_like(rollout)
    if config.off_policy == "decoupled":
        weight = importance_weight(config, log_weight=_log_ratio(prox, rollout), loss_mask=mask)

    # The normaliser is the whole step's, so that micro-batches and ranks add up to one loss.
    if num_tokens is None:
        num_tokens = mask.sum() if config.aggregation == "token_mean" else mask.any(-1).sum()
    policy_term = _aggregate(config, weight * token_loss, mask=mask, normaliser=num_tokens)
    kl_term = torch.zeros_like(policy_term)
    if config.kl_beta > 0 and ref_logprobs is not None:
        ref = _keep(ref_logprobs, mask).detach()
        token_kl = reference_kl(logprobs, ref_logprobs=ref, estimator=config.kl_estimator)
        kl_term = _aggregate(config, token_kl, mask=mask, normaliser=num_tokens)

    metrics = {"loss/policy": policy_term.detach(), "loss/kl": kl_term.detach()}
    token_metrics = {name: values.detach() for name, values in token_metrics.items()}
    token_metrics["off_policy/masked_fraction"] = weight == 0
    metrics |= _token_metrics(token_metrics, log_mismatch=_log_ratio(logprobs, rollout).detach(), mask=mask)
    return policy_term + config.kl_beta * kl_term, metrics


def reference_kl(logprobs: Tensor, *, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token, [B, T]: with x = ref - lp,

        k1  -x        k2  x^2 / 2        k3  exp(x) - x - 1

    (Schulman, "Approximating KL divergence", 2020).
    """
    x = _log_ratio(ref_logprobs, logprobs)
    if estimator == "k1":
        return -x
    return x.square() / 2 if estimator == "k2" else torch.expm1(x) - x


def importance_weight(config: LossConfig, *, log_weight: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the weight [B, T] of each token from log_weight = log(pi_prox / pi_behav) [B, T], itself 0 at masked positions.

    `importance_sampling` names a level and an operation. Level: `token`, the token's own ratio; `sequence`, the product of its
    sequence's ratios; `geometric`, their geometric mean. Operation: `truncate`, min(w, importance_max); `mask`, 0 outside
    [importance_min, importance_max]. None: the token's ratio as it is.
    """
    if config.importance_sampling is None:
        return log_weight.exp()
    level, operation = config.importance_sampling.split("_")
    if level == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(log_weight)
    elif level == "geometric":
        log_weight = _sequence_mean(log_weight, mask=loss_mask).expand_as(log_weight)
    weight = log_weight.exp()
    if operation == "truncate":
        return weight.clamp(max=config.importance_max)
    is_kept = (weight >= (config.importance_min or 0.0)) & (weight <= config.importance_max)
    return torch.where(is_kept, weight, 0.0)


def combine_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the metrics of micro-batches (and ranks) into those of the step. Associative; one part is returned unchanged.

    `loss/policy`, `loss/kl` and `loss/num_tokens` add up; `off_policy/ratio_max` and `off_policy/sequence_log_ratio_max`
    are maxima; `off_policy/ess` is mean(w)^2 / mean(w^2) of the combined means; all else is a mean per loss token,
    weighted by `loss/num_tokens`.
    """
    parts = list(parts)
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    num_tokens = stacked["loss/num_tokens"]
    share = num_tokens / num_tokens.sum().clamp(min=1)
    combined = {name: (values * share).sum() for name, values in stacked.items()}
    for name in combined.keys() & {"loss/policy", "loss/kl", "loss/num_tokens"}:
        combined[name] = stacked[name].sum()
    for name in combined.keys() & {"off_policy/ratio_max", "off_policy/sequence_log_ratio_max"}:
        combined[name] = stacked[name].max()
    if "off_policy/ess" in combined:
        combined["off_policy/ess"] = _ess(combined["off_policy/ratio_mean"], combined["off_policy/ratio_square_mean"])
    return combined


def _grpo(config: LossConfig, tokens: LossInputs) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), per token. arXiv:2402.03300, 1707.06347.

    Dual clip (arXiv:1912.09729) caps rho after the clipped term is formed.
    """
    ratio, advantages = tokens.log_ratio.exp(), tokens.advantages
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    clipped = ratio.clamp(low, high) * advantages
    capped = ratio if config.dual_clip is None else ratio.clamp(max=config.dual_clip)
    loss = -torch.minimum(capped * advantages, clipped)
    return loss, _clip_ratio(low=(ratio < low) & (advantages < 0), high=(ratio > high) & (advantages > 0))


def _gspo(config: LossConfig, tokens: LossInputs) -> TokenLoss:
    """As grpo with the sequence's geometric mean ratio, gradient through the mean. arXiv:2507.18071."""
    mean = _sequence_mean(tokens.log_ratio, mask=tokens.mask)  # [B, 1]
    return _grpo(config, replace(tokens, log_ratio=mean.expand_as(tokens.log_ratio)))


def _reinforce(config: LossConfig, tokens: LossInputs) -> TokenLoss:
    """-sg(min(rho, cap)) A lp: REINFORCE under a truncated importance weight; every token keeps a gradient.

    cap: cispo_cap with `cispo`, arXiv:2506.13585; importance_max with `reinforce`.
    """
    cap = config.cispo_cap if config.loss == "cispo" else config.importance_max
    ratio = tokens.log_ratio.detach().exp()
    loss = -ratio.clamp(max=cap) * tokens.advantages * tokens.logprobs
    return loss, _clip_ratio(low=torch.zeros_like(tokens.mask), high=ratio > cap)


def _sapo(config: LossConfig, tokens: LossInputs) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (rho - 1)) A: a soft gate, nothing is clipped. arXiv:2511.20347."""
    advantages, nowhere = tokens.advantages, torch.zeros_like(tokens.mask)
    positive, negative = advantages.new_tensor((config.sapo_tau_pos, config.sapo_tau_neg))
    tau = torch.where(advantages > 0, positive, negative)
    gate = 4.0 / tau * torch.sigmoid(tau * (tokens.log_ratio.exp() - 1.0))
    return -gate * advantages, _clip_ratio(low=nowhere, high=nowhere)


def _dppo(config: LossConfig, tokens: LossInputs) -> TokenLoss:
    """-rho A where kept, + 1e-3 (log rho)^2 everywhere; arXiv:2602.04879 (binary TV) with prime-rl's square.

    Dropped: A > 0 and p - mu > clip_high, or A <= 0 and p - mu < -clip_low; p and mu are probabilities.
    """
    logprobs = tokens.logprobs.detach()
    moved = logprobs.exp() - (logprobs - tokens.log_ratio.detach()).exp()  # p - mu
    high = (tokens.advantages > 0) & (moved > config.clip_high)
    low = (tokens.advantages <= 0) & (moved < -config.clip_low)
    surrogate = torch.where(high | low, 0.0, tokens.log_ratio.exp() * tokens.advantages)
    return DPPO_PULL * tokens.log_ratio.square() - surrogate, _clip_ratio(low=low, high=high)


def _clip_ratio(*, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    return {"clip_ratio/low": low, "clip_ratio/high": high}


_LOSSES: dict[str, LossFunction] = {
    "grpo": _grpo,
    "gspo": _gspo,
    "cispo": _reinforce,
    "sapo": _sapo,
    "reinforce": _reinforce,
    "dppo": _dppo,
}


def is_zero_without_advantage(config: LossConfig) -> bool:
    """Return whether a sequence whose advantage is 0 has a loss and a gradient of 0: no other term reaches it."""
    return config.kl_beta == 0 and config.loss in _LOSSES.keys() - {"dppo"}


@functools.cache
def _loss_function(name: str) -> LossFunction:
    """Return the formula that `trainer.loss.loss` names. Raises ConfigError where it is a path without a function."""
    found: LossFunction = _LOSSES.get(name) or find_function(name, where="trainer.loss.loss")
    return found


def _aggregate(config: LossConfig, values: Tensor, *, mask: Tensor, normaliser: int | Tensor) -> Tensor:
    """Reduce [B, T] to a scalar; `policy_loss` says how."""
    values = _keep(values, mask)
    if config.aggregation == "sequence_mean":
        total = _sequence_mean(values, mask=mask).sum()
    else:
        total = values.sum() / (config.horizon or 1)
    return total / torch.as_tensor(normaliser, device=values.device).clamp(min=1)


def _token_metrics(token_metrics: dict[str, Tensor], *, log_mismatch: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Average, over loss tokens, the loss's own metrics and the mismatch w = exp(lp - rollout), trainer against sampler."""
    ratio = log_mismatch.exp()
    per_token = token_metrics | {
        "off_policy/ratio_mean": ratio,
        "off_policy/ratio_square_mean": ratio.square(),
        "off_policy/mismatch_kl": torch.expm1(log_mismatch) - log_mismatch,
        "off_policy/logprob_abs_diff": log_mismatch.abs(),
    }
    num_tokens = mask.sum().to(ratio.dtype)
    metrics = {
        name: _keep(values.to(ratio.dtype), mask).sum() / num_tokens.clamp(min=1) for name, values in per_token.items()
    }
    metrics["loss/num_tokens"] = num_tokens
    metrics["off_policy/ratio_max"] = _keep(ratio, mask).amax() if mask.numel() else torch.zeros_like(num_tokens)
    drift = log_mismatch.sum(-1).abs()  # [B]; masked positions hold 0
    metrics["off_policy/sequence_log_ratio_max"] = drift.amax() if mask.numel() else torch.zeros_like(num_tokens)
    metrics["off_policy/ess"] = _ess(metrics["off_policy/ratio_mean"], metrics["off_policy/ratio_square_mean"])
    return metrics


def _ess(mean: Tensor, square_mean: Tensor) -> Tensor:
    """Return the effective sample size as a share, (sum w)^2 / (n sum w^2) = mean(w)^2 / mean(w^2); 0 of nothing."""
    return torch.where(square_mean > 0, mean.square() / square_mean.clamp(min=torch.finfo(mean.dtype).tiny), 0.0)


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    """Return values where the mask holds, 0 elsewhere: by selection, since nan * 0 is nan."""
    return torch.where(mask, values, 0.0)


def _sequence_mean(values: Tensor, *, mask: Tensor) -> Tensor:
    """Average over each sequence's loss tokens, [B, T] -> [B, 1]; values are 0 where masked."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
