"""The policy being trained: float32 master weights, AdamW, schedule, and one optimizer step over micro-batches.

Legend: B = sequences, T = completion tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.canary import CanarySequence
from common.config import Config
from common.logprobs import completion_logprobs, pad_sequences
from common.model import load_weights, named_weights, resolve_device
from common.truncation import Truncation
from trainer.batch import MicroBatch, step_normaliser
from trainer.loss import combine_metrics, policy_loss


class TrainedPolicy:
    """Model, optimizer and schedule, moved on by `optimize`.

    end_token_ids: what ends a completion; sampling.min_tokens is reproduced with them.
    """

    def __init__(self, model: Any, config: Config, *, end_token_ids: Sequence[int] = ()) -> None:
        self._config = config
        self._truncation = Truncation.of(config.sampling, end_token_ids=end_token_ids)
        trainer = config.trainer
        self.device = resolve_device(trainer.device)
        self.model = model.to(self.device, dtype=torch.float32).train()
        if trainer.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.model, trainer.weight_decay),
            lr=trainer.learning_rate,
            betas=trainer.betas,
            eps=trainer.eps,
            fused=self.device.type == "cuda",
        )

    def optimize(self, micro_batches: list[MicroBatch], *, step: int) -> dict[str, float]:
        """One optimizer step (`step` counts from 1); its metrics. Gradients do not depend on the split into micro-batches."""
        config = self._config.trainer
        normaliser = step_normaliser(micro_batches, aggregation=config.loss.aggregation)
        parts = [self._accumulate(batch.to(self.device), normaliser) for batch in micro_batches]
        began = time.monotonic()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        learning_rate = config.learning_rate * schedule_factor(self._config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {name: float(value) for name, value in combine_metrics(parts).items()}
        metrics["time/optimizer"] = time.monotonic() - began
        return {**metrics, "grad_norm": float(grad_norm), "learning_rate": learning_rate}

    def _accumulate(self, batch: MicroBatch, normaliser: int) -> dict[str, Tensor]:
        config = self._config
        with self._autocast():
            logprobs, entropy = completion_logprobs(
                self.model,
                batch.input_ids,
                batch.prompt_lengths,
                batch.completion_lengths,
                temperature=config.sampling.temperature,
                truncation=self._truncation,
                with_entropy=True,
            )
        loss, metrics = policy_loss(
            config.trainer.loss,
            policy_logprobs=logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            ref_logprobs=batch.ref_logprobs,
            num_tokens=normaliser,
        )
        loss.backward()
        assert entropy is not None
        metrics["entropy"] = entropy[batch.loss_mask].mean() if batch.loss_mask.any() else loss.detach() * 0
        return metrics

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _autocast(self) -> torch.autocast:
        name = self._config.trainer.autocast
        return torch.autocast(self.device.type, dtype=getattr(torch, name), enabled=name != "float32")

    @torch.no_grad()
    def score(self, sequences: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> list[CanarySequence]:
        """The canary of the present weights, from (prompt_ids, token_ids): logprobs at temperature 1."""
        padded = pad_sequences([prompt for prompt, _ in sequences], [tokens for _, tokens in sequences])
        self.model.eval()
        with self._autocast():
            logprobs, _ = completion_logprobs(self.model, *(tensor.to(self.device) for tensor in padded))
        self.model.train()
        rows = logprobs.float().cpu().numpy()
        return [
            CanarySequence(prompt_ids=prompt, token_ids=tokens, logprobs=row[: len(tokens)].copy())
            for (prompt, tokens), row in zip(sequences, rows, strict=True)
        ]

    @torch.no_grad()
    def snapshot(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A copy of the weights on the CPU, in the sampling precision; training may go on while it travels."""
        return {
            name: _on_cpu(weight.detach(), dtype if weight.is_floating_point() else weight.dtype)
            for name, weight in named_weights(self.model).items()
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state as flat tensors, `<parameter>/<exp_avg|exp_avg_sq|step>`: no pickle needed to keep it."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """The inverse of `snapshot(float32)` and `optimizer_tensors`."""
        load_weights(self.model, weights)
        parameters = dict(self.model.named_parameters())
        for name, value in optimizer.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            on_device = value if key == "step" and self.device.type == "cpu" else value.to(parameter.device)
            self.optimizer.state[parameter][key] = on_device.clone()


def _on_cpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy. Into memory from numpy, which asks for huge pages: training waits a third of the time."""
    memory = torch.from_numpy(np.empty(tuple(weight.shape), dtype=f"i{dtype.itemsize}"))
    return memory.view(dtype).copy_(weight)


def schedule_factor(config: Config, step: int) -> float:
    """Share of the peak learning rate at an optimizer step counted from 1: linear warm-up, then the schedule."""
    trainer = config.trainer
    if step <= trainer.warmup_steps:
        return step / trainer.warmup_steps
    progress = (step - trainer.warmup_steps) / max(1, trainer.num_steps - trainer.warmup_steps)
    if trainer.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if trainer.schedule == "cosine" else 1.0


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> Iterable[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
