"""The model being trained: float32 master weights, AdamW, schedule, and the optimizer steps over one batch.

It minimises an `Objective`: that of the run's config (`objective_of`), or that of `sluice.trainer.sft`.

Each of several ranks holds a `TrainedPolicy` and makes the same calls at the same time (`trainer.distributed.parallel`);
gradients and metrics are those of all ranks' micro-batches together.

Legend: B = sequences, T = completion tokens.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sluice.common.config import Config, SamplingConfig
from sluice.common.config.trainer import TrainerConfig
from sluice.common.errors import ConfigError, DigestMismatch, DiskFull, Diverged
from sluice.common.models.causal_lm import kept_dtype, named_weights
from sluice.common.models.logprobs import check_scoring, pad_sequences
from sluice.common.models.packing import enable_packing
from sluice.common.models.probe import LOADED
from sluice.common.policies.canary import CanarySequence
from sluice.trainer.adapter import Adapter
from sluice.trainer.checkpoint import SavedTensors, write_tensors
from sluice.trainer.distributed.ranks import Ranks
from sluice.trainer.distributed.sharding import (
    distributed,
    gathered,
    is_sharded,
    own_part,
    own_rows,
    release,
    without_reduction,
)
from sluice.trainer.loss import combine_metrics
from sluice.trainer.micro_batches import MicroBatch, Sequences, find_logprobs, padding_share, step_normaliser
from sluice.trainer.objective import Objective, objective_of
from sluice.trainer.scorer import Scorer, autocast

log = logging.getLogger("sluice.trainer")

MAX_SKIPPED = 10
"""Optimizer steps in a row that are skipped for a non-finite gradient before training has diverged."""


class TrainedPolicy:
    """Model, optimizer and schedule, advanced by `optimize`.

    sampling: the sampling distribution where a micro-batch does not name it; the trainer's logprobs are those of that
    distribution. end_token_ids: what ends a completion.
    ranks: those that train it together, of which this process is one; by default the only one.
    """

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        *,
        objective: Objective,
        sampling: SamplingConfig | None = None,
        end_token_ids: Sequence[int] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self._objective = objective
        self._num_skipped = 0
        self._first_pass: list[tuple[MicroBatch, Tensor]] = []
        self._ranks = ranks or Ranks()
        self.device = self._ranks.device(config.device)
        self.adapter = Adapter(model, config.lora) if config.lora else None
        # No noise by whatever name (dropout, jitter, skipped layers): a logprob is that of the distribution sampled from.
        self.model = model.to(dtype=torch.float32).eval()
        if not is_sharded(self._ranks, parallel=config.parallel, device=self.device):
            self.model.to(self.device)
        check_scoring(self.model, longest=config.seq_len, bound=LOADED)
        self.is_packed = config.packing == "auto" and _packs(self.model, config)
        if config.gradient_checkpointing:
            _checkpoint_layers(self.model)
        self._scorer = Scorer(self.model, autocast=config.autocast, sampling=sampling, end_token_ids=end_token_ids)
        self._trained = distributed(
            self._scorer,
            self._ranks,
            parallel=config.parallel,
            device=self.device,
            compute=getattr(torch, config.autocast),
        )
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @classmethod
    def of_run(
        cls, model: Any, config: Config, *, end_token_ids: Sequence[int] = (), ranks: Ranks | None = None
    ) -> TrainedPolicy:
        """Make the policy of a run. end_token_ids: what ends a completion; sampling.min_tokens is reproduced with them."""
        return cls(
            model,
            config.trainer,
            objective=objective_of(config.trainer),
            sampling=config.sampling,
            end_token_ids=end_token_ids,
            ranks=ranks,
        )

    def configure(self, config: TrainerConfig) -> None:
        """Use this config's learning rate, schedule, clipping and policy loss from the next `optimize` on; for runs."""
        self.config, self._objective = config, objective_of(config)

    def optimize(self, micro_batches: list[MicroBatch], *, step: int, left_out: int = 0) -> dict[str, float]:
        """Make `num_iterations` optimizer steps on one batch (`step` counts batches from 1); return the metrics of the last.

        micro_batches: this rank's, as many as on every other. Gradients do not depend on the split into micro-batches and ranks.
        left_out: what sequences without a gradient, which are in no micro-batch, add to the normaliser. From the second iteration
        on, `decoupled` losses take the logprobs of the first as those of the proximal policy.
        """
        # The step's normaliser is known before the first backward pass, over all ranks: gradients add up to those of one batch.
        batches = [batch.to(self.device) for batch in micro_batches]
        masks, aggregation = [batch.loss_mask for batch in batches], self.config.loss.aggregation
        normaliser = left_out + sum(self._ranks.gather(step_normaliser(masks, aggregation=aggregation)))
        learning_rate = self.config.learning_rate * schedule_factor(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        prox: list[Tensor | None] = [None] * len(batches)
        optimizer_s = 0.0
        for iteration in range(self.config.num_iterations):
            # One forward and backward pass per micro-batch; ranks exchange gradients with the last of them only.
            scored: list[tuple[Tensor, dict[str, Tensor]]] = []
            for i, (batch, before) in enumerate(zip(batches, prox, strict=True), start=1):
                with nullcontext() if i == len(batches) else without_reduction(self._trained):
                    logprobs, entropy = self._trained(
                        batch.input_ids, batch.prompt_lengths, batch.completion_lengths, sampling=batch.sampling
                    )
                    loss, metrics = self._objective(
                        policy_logprobs=logprobs, **batch.loss_inputs, prox_logprobs=before, num_tokens=normaliser
                    )
                    loss.backward()
                metrics["entropy"] = entropy[batch.loss_mask].mean() if batch.loss_mask.any() else loss.detach() * 0
                scored.append((logprobs.detach(), metrics))

            # The first pass has seen the weights that the batch began with: its logprobs are those of the proximal policy.
            if iteration == 0:
                self._first_pass = [(batch, found) for batch, (found, _) in zip(micro_batches, scored, strict=True)]
                prox = [found for found, _ in scored] if self.config.num_iterations > 1 else prox

            # The norm is that of all ranks, so either all step or all skip.
            began = time.monotonic()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            grad_norm = float(gathered(norm, norm.dtype))
            if math.isfinite(grad_norm):
                self.optimizer.step()
                self._num_skipped = 0
            else:
                self._skip(step)
            self.optimizer.zero_grad(set_to_none=True)
            optimizer_s += time.monotonic() - began
        return {
            **self._combined([metrics for _, metrics in scored]),
            "grad_norm": grad_norm,
            "optimizer/skipped_in_a_row": float(self._num_skipped),
            "learning_rate": learning_rate,
            "padding_share": self._padding_share(batches),
            "time/optimizer": optimizer_s,
        }

    def _skip(self, step: int) -> None:
        """Skip a non-finite gradient: an occasional one is a bad batch, many in a row mean that training has diverged."""
        self._num_skipped += 1
        log.error("step %d: the gradient is not finite; this optimizer step is skipped", step)
        if self._num_skipped == MAX_SKIPPED:
            raise Diverged(
                f"step {step}: the gradients of {MAX_SKIPPED} optimizer steps in a row were not finite; the weights are those "
                "before them. Lower trainer.learning_rate, set trainer.autocast=float32, or look at the rewards of these steps"
            )

    def _combined(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """Combine the step's metrics over all ranks."""
        own = {name: float(value) for name, value in combine_metrics(parts).items()}
        if self._ranks.size == 1:
            return own
        every = [{name: torch.tensor(value) for name, value in part.items()} for part in self._ranks.gather(own)]
        return {name: float(value) for name, value in combine_metrics(every).items()}

    def _padding_share(self, batches: list[MicroBatch]) -> float:
        """Return the padding share over all ranks."""
        own = [padding_share(batches, packed=self.is_packed), sum(batch.num_padded_tokens for batch in batches)]
        every = self._ranks.gather(own)
        return float(sum(share * tokens for share, tokens in every) / sum(tokens for _, tokens in every))

    @property
    def base_digest(self) -> str:
        """Digest of the adapter's base weights and its scale; empty where full weights are trained."""
        return self.adapter.base_digest if self.adapter else ""

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def logprobs_of(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        """Return float32 [T] each, as the last `optimize` found them before its first step; None for what was not in it."""
        every = self._ranks.gather(find_logprobs(self._first_pass, sequences))
        return [next((row for row in found if row is not None), None) for found in zip(*every, strict=True)]

    @torch.no_grad()
    def score(self, sequences: Sequences) -> list[CanarySequence]:
        """Make the canary of the present weights from (prompt_ids, token_ids): logprobs at temperature 1.

        With an adapter also those of its base, so that a sampler that serves the base is recognised.
        """
        padded = pad_sequences([prompt for prompt, _ in sequences], [tokens for _, tokens in sequences])
        tensors = [tensor.to(self.device) for tensor in padded]
        rows = self._scorer(*tensors, for_loss=False)[0].float().cpu().numpy()
        base_rows = None
        if self.adapter is not None:
            with self.adapter.disabled():
                base_rows = self._scorer(*tensors, for_loss=False)[0].float().cpu().numpy()
        release(self._scorer)
        return [
            CanarySequence(
                prompt_ids=prompt,
                token_ids=tokens,
                logprobs=rows[i, : len(tokens)].copy(),
                base_logprobs=None if base_rows is None else base_rows[i, : len(tokens)].copy(),
            )
            for i, (prompt, tokens) in enumerate(sequences)
        ]

    @torch.no_grad()
    def snapshot(self, dtype: torch.dtype, *, full: bool = False) -> dict[str, Tensor]:
        """Copy the weights to the CPU of rank 0, in the sampling precision; training may continue while the copy travels.

        Where an adapter is trained, its tensors in float32; with `full` its base weights. Sharded weights are gathered one by
        one. Empty on the other ranks.
        """
        weights = self._trained_weights()
        if self.adapter is not None:
            weights = self.adapter.base_weights() if full else weights
            dtype = dtype if full else torch.float32
        copies = {}
        for name, weight in weights.items():
            kept = kept_dtype(weight, dtype)
            weight = gathered(weight, kept)
            if self._ranks.rank == 0:
                copies[name] = _on_cpu(weight.detach(), kept)
        return copies

    @torch.no_grad()
    def save(self, folder: Path) -> dict[str, str]:
        """Write this rank's part of the weights and of AdamW's state; the digests of all ranks' files, by name.

        Raises DiskFull on every rank when one has no room.
        """
        digests: dict[str, str] = {}
        problem = ""
        try:
            for kind, tensors in (("model", self._trained_weights()), ("optimizer", self._optimizer_tensors())):
                parts = {name: own_part(tensor, self._ranks) for name, tensor in tensors.items()}
                own = {name: part for name, part in parts.items() if part is not None}
                digests |= write_tensors(folder, kind, own, rank=self._ranks.rank)
        except DiskFull as error:
            problem = str(error)
        reports = self._ranks.gather({"digests": digests, "problem": problem})
        if problems := [report["problem"] for report in reports if report["problem"]]:
            raise DiskFull(problems[0])
        return {name: digest for report in reports for name, digest in report["digests"].items()}

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Invert `save`, on any number of ranks: each reads its rows.

        Raises DigestMismatch for another model's, ConfigError for the adapter of another config.
        """
        saved = SavedTensors(folder, "model")
        weights = self._trained_weights()
        if self.adapter is not None:
            self.adapter.check({name: tuple(saved.shape(name)) for name in saved.names})
        if saved.names != weights.keys():
            odd = sorted(saved.names ^ weights.keys())[:5]
            raise DigestMismatch(
                f"{folder} and the model differ in {len(saved.names ^ weights.keys())} tensors, e.g. {odd}"
            )
        for name, weight in weights.items():
            self._fill(weight, saved, name)
        parameters = dict(self.model.named_parameters())
        saved = SavedTensors(folder, "optimizer")
        for name in saved.names:
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            if key == "step":
                state = saved.full(name).clone().to(self.device)  # not the file's memory
            else:
                state = torch.zeros_like(parameter)
                self._fill(state, saved, name)
            self.optimizer.state[parameter][key] = state

    def _trained_weights(self) -> dict[str, Tensor]:
        """Return what checkpoints and versions hold: all weights, or those of the adapter."""
        return named_weights(self.model) if self.adapter is None else self.adapter.weights()

    def _fill(self, tensor: Tensor, saved: SavedTensors, name: str) -> None:
        if (shape := saved.shape(name)) != tensor.shape:
            raise DigestMismatch(f"{name}: the checkpoint has shape {tuple(shape)}, the model {tuple(tensor.shape)}")
        own, start = own_rows(tensor, self._ranks)
        own.copy_(saved.full(name) if start is None else saved.rows(name, start, start + own.shape[0]))

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Return AdamW's state as flat tensors, `<parameter>/<exp_avg|exp_avg_sq|step>`: no pickle needed to keep it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[id(parameter)]}/{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }


def _checkpoint_layers(model: torch.nn.Module) -> None:
    """Recompute every layer in the backward pass; transformers' own switch acts in train mode only. Raises ConfigError."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"trainer.gradient_checkpointing: {type(model).__name__} has no layers for it; set it to false"
        )
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _packs(model: Any, config: TrainerConfig) -> bool:
    with autocast(next(model.parameters()).device, config.autocast):
        reason = enable_packing(model, longest=config.seq_len)
    if reason:
        log.warning("micro-batches are padded: %s", reason)
    return reason is None


def _on_cpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy contiguously, into memory from numpy, which asks for huge pages: training waits a third of the time."""
    memory = torch.from_numpy(np.empty(tuple(weight.shape), dtype=f"i{dtype.itemsize}"))
    return memory.view(dtype).copy_(weight)


def schedule_factor(config: TrainerConfig, step: int) -> float:
    """Return the share of the peak learning rate at a step counted from 1: linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> Iterable[dict[str, Any]]:
    """Split the trained parameters: matrices decay, norms and biases do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
