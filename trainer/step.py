"""One step of training as a function of groups and config alone: called by the loop and by `sluice replay`."""

from __future__ import annotations

import time

from torch import Tensor

from sluice.common.config import Config
from sluice.common.types import Group
from sluice.trainer.advantage import batch_advantages
from sluice.trainer.distributed.parallel import ParallelPolicy
from sluice.trainer.reward_shaping import mask_metrics, rewards_of


def train_on(
    policy: ParallelPolicy, groups: list[Group], config: Config, *, step: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Compute advantages, make the optimizer step; return its metrics and the advantages [G] of each group.

    `step` counts from 1. The order of the groups is part of the input: sums of floats depend on it in the last bits.
    """
    policy.configure(config.trainer)
    rewards = [rewards_of(group, config) for group in groups]
    advantages = batch_advantages(rewards, method=config.trainer.advantage)
    began = time.monotonic()
    metrics = mask_metrics(groups, config) | policy.optimize(groups, advantages, step=step)
    metrics["time/forward_backward"] = time.monotonic() - began
    return metrics, advantages
