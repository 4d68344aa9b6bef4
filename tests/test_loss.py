"""Policy loss: every objective against a loop over tokens, worked numbers, and what must never change it."""

import math
from itertools import product
from typing import get_args

import pytest
import torch
from builders import for_each

from sluice.common.config.trainer import LossConfig, LossName
from sluice.trainer.loss import combine_metrics, policy_loss

LOSSES = get_args(LossName)
AGGREGATIONS = ("token_mean", "sequence_mean", "fixed_horizon")
BANDS = [
    {},
    {"importance_sampling": "token_truncate", "importance_max": 1.1},
    {"importance_sampling": "token_mask", "importance_min": 0.8, "importance_max": 1.2},
    {"importance_sampling": "sequence_truncate", "importance_max": 1.1},
    {"importance_sampling": "sequence_mask", "importance_min": 0.5, "importance_max": 2.0},
    {"importance_sampling": "geometric_mask", "importance_min": 0.95, "importance_max": 1.05},
]


def every(*choices):
    return list(product(*choices))


def config_of(**changes):
    if changes.get("aggregation") == "fixed_horizon":
        changes.setdefault("horizon", 11)
    return LossConfig(**changes)


def batch_of(*lengths, seed=0, spread=0.3, dtype=torch.float64):
    """Random [B, T] inputs; sequence i has lengths[i] loss tokens, the rest is masked."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    policy = -2 * torch.rand(shape, generator=draw, dtype=dtype) - 0.05
    near = [policy + spread * torch.randn(shape, generator=draw, dtype=dtype) for _ in range(3)]
    return {
        "policy_logprobs": policy,
        "rollout_logprobs": near[0].clamp(max=0),
        "prox_logprobs": near[1].clamp(max=0),
        "ref_logprobs": near[2].clamp(max=0),
        "advantages": torch.randn(len(lengths), generator=draw, dtype=dtype),
        "loss_mask": torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(-1),
    }


def run(config, batch, **changes):
    """Loss, gradient at policy_logprobs, metrics."""
    policy = batch["policy_logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(config, **{**batch, "policy_logprobs": policy, **changes})
    loss.backward()
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    return loss.detach(), policy.grad, metrics


def naive_token_loss(config, *, lp, old, advantage, sequence_log_ratio):
    """One token, by the formulas of docs/algorithms.md; lp and sequence_log_ratio carry the gradient."""
    rho = torch.exp(lp - old)
    if config.loss == "gspo":
        rho = torch.exp(sequence_log_ratio)
    if config.loss in ("grpo", "gspo"):
        low, high = lp.new_tensor((1 - config.clip_low, 1 + config.clip_high))
        clipped = min(max(rho, low), high) * advantage
        if config.dual_clip is not None:
            rho = min(rho, lp.new_tensor(config.dual_clip))
        return -min(rho * advantage, clipped)
    if config.loss in ("cispo", "reinforce"):
        cap = config.cispo_cap if config.loss == "cispo" else config.importance_max
        return -min(rho.item(), cap) * advantage * lp
    if config.loss == "sapo":
        tau = config.sapo_tau_pos if advantage > 0 else config.sapo_tau_neg
        return -(4 / tau) / (1 + torch.exp(-tau * (rho - 1))) * advantage
    moved = math.exp(lp.item()) - math.exp(old.item())
    is_dropped = moved > config.clip_high if advantage > 0 else moved < -config.clip_low
    return 1e-3 * (lp - old) ** 2 - (0.0 if is_dropped else rho * advantage)


def naive_weights(config, log_weights):
    """Importance weight per token of one sequence, from floats."""
    if config.importance_sampling is None:
        return [math.exp(x) for x in log_weights]
    level, operation = config.importance_sampling.split("_")
    shared = {"sequence": sum(log_weights), "geometric": sum(log_weights) / len(log_weights)}.get(level)
    weights = [math.exp(x if shared is None else shared) for x in log_weights]
    if operation == "truncate":
        return [min(w, config.importance_max) for w in weights]
    return [w if config.importance_min <= w <= config.importance_max else 0.0 for w in weights]


def naive_loss(config, batch):
    """The whole loss with python loops."""
    lp, mask = batch["policy_logprobs"], batch["loss_mask"]
    sequences = []
    for b in range(len(lp)):
        at = [t for t in range(lp.shape[1]) if mask[b, t]]
        if not at:
            continue
        rollout, prox, ref = ([batch[f"{name}_logprobs"][b, t] for t in at] for name in ("rollout", "prox", "ref"))
        old = rollout if config.off_policy == "bypass" else prox
        mean = sum(lp[b, t] - o for t, o in zip(at, old, strict=True)) / len(at)
        weights = naive_weights(config, [float(p - r) for p, r in zip(prox, rollout, strict=True)])
        terms = []
        for i, t in enumerate(at):
            term = naive_token_loss(
                config, lp=lp[b, t], old=old[i], advantage=batch["advantages"][b], sequence_log_ratio=mean
            )
            term = term * (weights[i] if config.off_policy == "decoupled" else 1.0)
            x = ref[i] - lp[b, t]
            kl = {"k1": -x, "k2": x**2 / 2, "k3": torch.exp(x) - x - 1}[config.kl_estimator]
            terms.append(term + config.kl_beta * kl)
        sequences.append(terms)
    if config.aggregation == "sequence_mean":
        return sum(sum(terms) / len(terms) for terms in sequences) / len(sequences)
    total = sum(sum(terms) for terms in sequences)
    num_tokens = sum(len(terms) for terms in sequences)
    return total / (num_tokens if config.aggregation == "token_mean" else len(sequences) * config.horizon)


def assert_matches_naive(config, batch):
    loss, gradient, _ = run(config, batch)
    policy = batch["policy_logprobs"].clone().requires_grad_()
    expected = naive_loss(config, {**batch, "policy_logprobs": policy})
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gradient, policy.grad, atol=1e-12, rtol=1e-9)
    assert gradient.any()


@for_each(("loss", "aggregation"), every(LOSSES, AGGREGATIONS))
def test_every_loss_is_the_loop_over_tokens(loss, aggregation):
    for seed, spread in ((0, 0.1), (1, 0.8)):
        batch = batch_of(4, 0, 7, 1, seed=seed, spread=spread)
        config = config_of(
            loss=loss, aggregation=aggregation, clip_low=0.1, clip_high=0.3, importance_max=1.3, cispo_cap=1.2
        )
        assert_matches_naive(config, batch)


@for_each(("loss", "band"), every(sorted(set(LOSSES) - {"dppo"}), BANDS))
def test_decoupled_is_the_weighted_loop_over_tokens(loss, band):
    assert_matches_naive(config_of(loss=loss, off_policy="decoupled", **band), batch_of(4, 2, 7, 1, spread=0.15))


@for_each(("estimator", "aggregation"), every(("k1", "k2", "k3"), AGGREGATIONS))
def test_kl_is_added_per_token(estimator, aggregation):
    config = config_of(kl_beta=0.3, kl_estimator=estimator, aggregation=aggregation)
    assert_matches_naive(config, batch_of(4, 2, 6))
    loss, _, metrics = run(config, batch_of(4, 2, 6))
    torch.testing.assert_close(loss, metrics["loss/policy"] + 0.3 * metrics["loss/kl"])


@for_each("loss", ["grpo", "gspo"])
def test_dual_clip_is_the_loop_over_tokens(loss):
    assert_matches_naive(config_of(loss=loss, dual_clip=1.5), batch_of(4, 7, spread=0.8))


def test_dppo_drops_by_probability_not_by_ratio():
    # sampler probability 0.5 -> trainer 0.75, 0.25, 0.65; then 0.001 -> 0.1, a ratio of 100 but a move of only 0.099
    moved = torch.tensor([[0.75, 0.25, 0.65, 0.1]])
    batch = {
        "policy_logprobs": moved.log(),
        "rollout_logprobs": torch.tensor([[0.5, 0.5, 0.5, 0.001]]).log(),
        "advantages": torch.ones(1),
        "loss_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    for advantage, kept in ((1.0, [0, 0.5, 1.3, 100]), (-1.0, [1.5, 0, 1.3, 100])):
        loss, _, metrics = run(config_of(loss="dppo"), batch | {"advantages": torch.tensor([advantage])})
        square = sum(math.log(ratio) ** 2 for ratio in (1.5, 0.5, 1.3, 100))
        assert float(loss) == pytest.approx((-advantage * sum(kept) + 1e-3 * square) / 4, rel=1e-5)
        dropped = (float(metrics["clip_ratio/low"]), float(metrics["clip_ratio/high"]))
        assert dropped == ((0.0, 0.25) if advantage > 0 else (0.25, 0.0))


def test_torchforges_value():
    # ratio = exp(lp - sg(lp)) = 1, k3 = 0: -(1 * 1) + 0.1 * 0 = -1, gradient -A / (T B) per token
    batch = {f"{name}_logprobs": torch.zeros(2, 3) for name in ("policy", "rollout", "ref")}
    batch |= {"advantages": torch.ones(2), "loss_mask": torch.ones(2, 3, dtype=torch.bool)}
    for off_policy in ("bypass", "decoupled"):
        config = config_of(kl_beta=0.1, aggregation="sequence_mean", off_policy=off_policy)
        loss, gradient, _ = run(config, batch)
        assert float(loss) == -1.0
        torch.testing.assert_close(gradient, torch.full((2, 3), -1 / 6))


def test_only_the_policy_has_a_gradient():
    policy = batch_of(4, 2)["policy_logprobs"].requires_grad_()  # also given as sampler, prox and reference
    batch = batch_of(4, 2) | {f"{name}_logprobs": policy for name in ("policy", "rollout", "prox", "ref")}
    for off_policy in ("bypass", "decoupled"):
        policy.grad = None
        policy_loss(config_of(off_policy=off_policy, kl_beta=0.1), **batch)[0].backward()
        expected = -torch.where(batch["loss_mask"], batch["advantages"].unsqueeze(-1), 0.0) / 6  # rho = 1, k3 is flat
        torch.testing.assert_close(policy.grad, expected)


def test_decoupled_without_prox_weights_the_policy_gradient():
    # r = 1, w = min(exp(lp - rollout), 2) = min(e, 2) = 2: loss -w A = -6, gradient -w r A = -6
    batch = batch_of(1) | {
        "policy_logprobs": torch.tensor([[-1.0]]),
        "rollout_logprobs": torch.tensor([[-2.0]]),
        "prox_logprobs": None,
        "advantages": torch.tensor([3.0]),
    }
    loss, gradient, _ = run(config_of(off_policy="decoupled", importance_sampling="token_truncate"), batch)
    assert (float(loss), float(gradient)) == (-6.0, -6.0)


def test_the_normaliser_is_counted_before_off_policy_masking():
    # two tokens, weights e^0 = 1 and e^3 (masked): the loss is -(1 * 1 + 0) / 2, not / 1
    batch = batch_of(2) | {
        "policy_logprobs": torch.tensor([[-1.0, -1.0]]),
        "prox_logprobs": None,
        "rollout_logprobs": torch.tensor([[-1.0, -4.0]]),
        "advantages": torch.tensor([1.0]),
    }
    for aggregation, expected in (("token_mean", -0.5), ("sequence_mean", -0.5), ("fixed_horizon", -1 / 11)):
        config = config_of(aggregation=aggregation, off_policy="decoupled", **BANDS[2])
        loss, _, metrics = run(config, batch)
        assert float(loss) == pytest.approx(expected)
        assert float(metrics["off_policy/masked_fraction"]) == 0.5


@for_each("loss", LOSSES)
def test_zero_advantage_gives_zero_gradient(loss):
    batch = batch_of(4, 2) | {"advantages": torch.zeros(2)}
    if loss == "dppo":  # its square pulls towards the sampler, whatever the advantage
        batch["rollout_logprobs"] = batch["policy_logprobs"]
    for off_policy in ("bypass",) if loss == "dppo" else ("bypass", "decoupled"):
        value, gradient, _ = run(config_of(loss=loss, off_policy=off_policy), batch)
        assert not gradient.any()
        assert float(value) == 0.0


@for_each("garbage", [1e30, math.inf, -math.inf, math.nan])
@for_each(("loss", "off_policy", "band"), every(LOSSES, ["bypass"], [{}]) + every(["gspo"], ["decoupled"], BANDS))
def test_masked_tokens_change_nothing(loss, off_policy, band, garbage):
    config = config_of(loss=loss, off_policy=off_policy, kl_beta=0.1, **band)
    clean = batch_of(4, 0, 7)
    mask = clean["loss_mask"]
    dirty = {name: torch.where(mask, v, garbage) if name.endswith("logprobs") else v for name, v in clean.items()}
    dirty["advantages"] = torch.where(mask.any(-1), clean["advantages"], garbage)
    expected, got = run(config, clean), run(config, dirty)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert not got[1][~mask].any()


@for_each(("loss", "aggregation"), every(LOSSES, AGGREGATIONS))
def test_micro_batches_add_up_to_the_step(loss, aggregation):
    config = config_of(loss=loss, aggregation=aggregation, kl_beta=0.1)
    lengths = (9, 1, 5, 2, 0, 7)
    batch = batch_of(*lengths, spread=0.6, dtype=torch.float32)
    loss_whole, gradient_whole, metrics_whole = run(config, batch)
    num_tokens = sum(lengths) if aggregation == "token_mean" else 5
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)):
        piece = {name: values[rows] for name, values in batch.items()}
        parts.append(run(config, piece, num_tokens=num_tokens))
    torch.testing.assert_close(sum(part[0] for part in parts), loss_whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient_whole, atol=1e-6, rtol=0)
    combined = combine_metrics(part[2] for part in parts)
    assert combined.keys() == metrics_whole.keys()
    torch.testing.assert_close(combined, metrics_whole, atol=1e-6, rtol=1e-5)
    by_rank = combine_metrics([combine_metrics(p[2] for p in parts[:2]), combine_metrics(p[2] for p in parts[2:])])
    torch.testing.assert_close(by_rank, metrics_whole, atol=1e-6, rtol=1e-5)


@for_each(("loss", "aggregation"), every(LOSSES, AGGREGATIONS))
def test_a_wholly_masked_batch_gives_zero_and_finite_metrics(loss, aggregation):
    batch = batch_of(3, 2) | {"loss_mask": torch.zeros(2, 3, dtype=torch.bool)}
    value, gradient, metrics = run(config_of(loss=loss, aggregation=aggregation, kl_beta=0.1), batch)
    assert float(value) == 0.0
    assert not gradient.any()
    assert {float(metric) for metric in metrics.values()} == {0.0}


@for_each("loss", LOSSES)
def test_policies_far_apart_stay_finite(loss):
    far = {"policy_logprobs": torch.tensor([[-200.0, -1e-6]]), "rollout_logprobs": torch.tensor([[-1e-6, -200.0]])}
    for advantage in (1.0, -1.0):
        batch = batch_of(2, dtype=torch.float32) | far | {"advantages": torch.tensor([advantage])}
        value, gradient, metrics = run(config_of(loss=loss, kl_beta=0.1), batch)
        assert all(torch.isfinite(x).all() for x in (value, gradient, *metrics.values()))


def test_metrics_compare_trainer_and_sampler():
    # w = 2, 1/2, 1: mean 3.5 / 3, ess = 3.5^2 / (3 * 5.25) = 7/9; k3 = w - 1 - ln w: 1 - ln 2, ln 2 - 1/2, 0
    rollout = torch.full((1, 4), -3.0)
    ratios = torch.tensor([[2.0, 0.5, 1.0, 9.0]])
    batch = {
        "policy_logprobs": rollout + ratios.log(),
        "rollout_logprobs": rollout,
        "advantages": torch.ones(1),
        "loss_mask": torch.tensor([[True, True, True, False]]),
    }
    for changes in ({}, {"off_policy": "decoupled"}):
        expected = {
            "off_policy/ratio_mean": 3.5 / 3,
            "off_policy/ratio_max": 2,
            "off_policy/ess": 7 / 9,
            "off_policy/mismatch_kl": 0.5 / 3,
            "off_policy/logprob_abs_diff": 2 * math.log(2) / 3,
            "off_policy/sequence_log_ratio_max": 0,  # ln 2 - ln 2 + 0
            "off_policy/masked_fraction": 0,
            "loss/num_tokens": 3,
            # A > 0: only the rise to 2 is clipped, and in `decoupled` rho = 1 clips nothing
            "clip_ratio/high": 0 if changes else 1 / 3,
            "clip_ratio/low": 0,
        }
        metrics = run(config_of(**changes), batch)[2]
        assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, abs=1e-6)


def test_kl_without_reference_logprobs_is_refused():
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        run(config_of(kl_beta=0.1), batch_of(2) | {"ref_logprobs": None})
