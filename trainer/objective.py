"""What an optimizer step minimises, per micro-batch: the policy loss, or a user's own function.

An `Objective` is called with the keywords of `sluice.trainer.loss.policy_loss` and returns a scalar, whose sum over the
micro-batches of a step is the step's loss, and detached metrics.

Legend: B = sequences, T = completion tokens, G = completions of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sluice.common.config.trainer import TrainerConfig
from sluice.common.errors import ConfigError
from sluice.common.loading import find_function, is_function_path
from sluice.trainer.advantage import batch_advantages
from sluice.trainer.loss import policy_loss

Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(*, policy_logprobs [B, T], rollout_logprobs [B, T], advantages [B], loss_mask [B, T], ref_logprobs [B, T] or none,
prox_logprobs [B, T] or none, num_tokens: the step's normaliser) -> (loss, metrics)"""


def objective_of(config: TrainerConfig) -> Objective:
    """Return what a run minimises. Raises ConfigError where a user's function cannot be loaded."""
    if config.objective is None:
        return partial(policy_loss, config.loss)
    return partial(_call, find_function(config.objective, where="trainer.objective"), config)


def check_functions(config: TrainerConfig) -> None:
    """Call a user's loss, advantage and objective once, on a batch of two completions. Raises ConfigError."""
    if config.objective is not None or is_function_path(config.loss.loss):
        key = "trainer.loss.loss" if config.objective is None else "trainer.objective"
        logprobs = torch.full((2, 3), -1.0, requires_grad=True)
        mask = torch.tensor([[True, True, True], [True, False, False]])
        inputs: dict[str, Any] = {"policy_logprobs": logprobs, "loss_mask": mask, "num_tokens": 4}
        inputs |= {f"{name}_logprobs": logprobs.detach() - 0.1 for name in ("rollout", "ref", "prox")}
        with _explained(key, config.objective or config.loss.loss):
            loss, _ = objective_of(config)(**inputs, advantages=torch.tensor([1.0, -1.0]))
            loss.backward()
    if is_function_path(config.advantage):
        with _explained("trainer.advantage", config.advantage):
            batch_advantages([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0, torch.nan])], method=config.advantage)


@contextmanager
def _explained(key: str, path: str) -> Iterator[None]:
    """Re-raise what a user's function raises as a ConfigError that names the key and the function."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}: {path!r} fails on a batch of two completions with {type(error).__name__}: {error} (docs/extending.md says "
            "what it is called with and what it returns)"
        ) from error


def _call(function: Objective, config: TrainerConfig, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Call a user's objective; add the metrics that every step has, where it returns none of its own."""
    loss, metrics = function(config.loss, **inputs)
    num_tokens = inputs["loss_mask"].sum().to(loss.dtype)
    known = {"loss/policy": loss.detach(), "loss/kl": torch.zeros_like(loss).detach(), "loss/num_tokens": num_tokens}
    return loss, known | metrics
