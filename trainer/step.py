"""One step of training as a function of groups and config alone: the loop calls it, and `sluice replay` calls it again."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from common.config_trainer import TrainerConfig
from common.types import Group
from trainer.advantage import batch_advantages
from trainer.batch import build_micro_batches
from trainer.policy import TrainedPolicy


def train_on(
    policy: TrainedPolicy, groups: list[Group], config: TrainerConfig, *, step: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Advantages, micro-batches and the optimizer step; the step's metrics, and the advantages [G] of each group.

    `step` counts from 1. The order of the groups is part of the input: sums of floats depend on it in the last bits.
    """
    rewards = [torch.tensor([_nan_if_none(e.reward) for e in group.episodes]) for group in groups]
    advantages = batch_advantages(rewards, method=config.advantage)
    micro_batches = build_micro_batches(groups, advantages, max_tokens=config.max_tokens_per_microbatch)
    began = time.monotonic()
    metrics = policy.optimize(micro_batches, step=step)
    metrics["time/forward_backward"] = time.monotonic() - began
    return metrics, advantages


def _nan_if_none(reward: float | None) -> float:
    return float("nan") if reward is None else reward
