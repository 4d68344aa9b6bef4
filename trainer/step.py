"""One step of training as a function of groups and config alone: the loop calls it, and `sluice replay` calls it again."""

from __future__ import annotations

import time

from torch import Tensor

from common.config import Config
from common.types import Group
from trainer.advantage import batch_advantages
from trainer.batch import build_micro_batches
from trainer.masks import mask_metrics, rewards_of
from trainer.parallel import ParallelPolicy, deal


def train_on(
    policy: ParallelPolicy, groups: list[Group], config: Config, *, step: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Advantages, micro-batches and the optimizer step; the step's metrics, and the advantages [G] of each group.

    `step` counts from 1. The order of the groups is part of the input: sums of floats depend on it in the last bits.
    """
    trainer = config.trainer
    rewards = [rewards_of(group, config) for group in groups]
    advantages = batch_advantages(rewards, method=trainer.advantage)
    shares = [
        build_micro_batches(
            *share,
            max_tokens=trainer.microbatch_tokens,
            packed=policy.is_packed,
            mask_truncated=trainer.mask_truncated,
        )
        for share in deal(groups, advantages, num_ranks=policy.num_ranks)
    ]
    began = time.monotonic()
    metrics = mask_metrics(groups, config) | policy.optimize(shares, step=step)
    metrics["time/forward_backward"] = time.monotonic() - began
    return metrics, advantages
