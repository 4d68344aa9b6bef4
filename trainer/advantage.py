"""Advantages from rewards, one group at a time: a baseline per group, and a scale per group or per batch.

A group is identified by its id and arrives as its own tensor: no slicing by position, so a group that lost a sample is
normalised alone. A reward of nan is unscorable: it is left out of baseline and scale and its advantage is 0. A group
without reward variance (fewer than two scorable samples, or all equal) gives exact zeros.

Legend: G = completions of one group. Formulas and sources: docs/algorithms.md.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from sluice.common.config.trainer import AdvantageName
from sluice.common.loading import find_function, is_function_path

EPS = 1e-4
"""Added to every standard deviation (TRL's value): keeps nearly equal rewards from becoming large advantages."""

_BATCH_METHODS = ("batch", "reinforce_pp")


def compute_advantages(rewards: Tensor, *, method: str = "group") -> Tensor:
    """Return the advantages [G] of one group from its rewards [G]; r below are the scorable rewards, n their number.

        group         A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with ddof=1     GRPO, arXiv:2402.03300
        none          A_i = r_i - mean(r)                                          Dr. GRPO, arXiv:2503.20783
        rloo          A_i = r_i - mean(r without r_i) = n/(n-1) (r_i - mean(r))    RLOO, arXiv:2402.14740
        maxrl         A_i = (r_i - mean(r)) / mean(r)                              MaxRL, arXiv:2602.02710
        batch         A_i = r_i - mean(r); `batch_advantages` scales it
        reinforce_pp  A_i = r_i - mean(r); `batch_advantages` scales it            REINFORCE++, arXiv:2501.03262

    Example: [1, 0, 0, 0] -> [1.49970, -0.49990, -0.49990, -0.49990] with `group`.
    Raises ValueError for an unknown method, and for negative rewards with `maxrl` (its scale would change sign).
    """
    if method not in get_args(AdvantageName):
        raise ValueError(f"unknown advantage method {method!r}: use one of {', '.join(get_args(AdvantageName))}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    scorable = ~rewards.isnan()
    scored = rewards[scorable]
    advantages = torch.zeros_like(rewards)
    if scored.numel() < 2 or bool((scored == scored[0]).all()):
        return advantages
    advantages[scorable] = (scored - scored.mean()) / _group_scale(scored, method=method)
    return advantages


def batch_advantages(groups: list[Tensor], *, method: str) -> list[Tensor]:
    """Return the advantages of every group of an optimizer step, in order; the trainer calls this for each method.

    Per group as in `compute_advantages`, then, over the scorable samples of all groups (pass those of every rank):

        batch         divided by std(all rewards) + 1e-4                  Lite PPO, arXiv:2508.08221
        reinforce_pp  divided by std(all centred rewards) + 1e-4          REINFORCE++-baseline, arXiv:2501.03262

    A step with fewer than two scorable samples is not scaled: all its advantages are 0.
    A path (`advantages.py:my_advantages`) names a function of your own, called with `groups`. Raises ConfigError where it
    cannot be loaded, ValueError where it returns anything but a finite advantage for every reward.
    """
    if is_function_path(method):
        found = find_function(method, where="trainer.advantage")(groups)
        if [a.shape for a in found] != [r.shape for r in groups] or not all(bool(a.isfinite().all()) for a in found):
            raise ValueError(
                f"trainer.advantage: {method!r} must return a finite advantage for each reward, as tensors [G]"
            )
        return [advantages.float() for advantages in found]
    advantages = [compute_advantages(rewards, method=method) for rewards in groups]
    if method not in _BATCH_METHODS or not groups:
        return advantages
    scorable = ~torch.cat(groups).isnan()
    scale_of = torch.cat(groups if method == "batch" else advantages)[scorable]
    if scale_of.numel() < 2:
        return advantages
    scale = scale_of.std() + EPS
    return [group / scale for group in advantages]


def _group_scale(scored: Tensor, *, method: str) -> Tensor:
    """Return what the centred rewards of one group are divided by; scored [n], n >= 2."""
    if method == "group":
        return scored.std() + EPS
    if method == "rloo":
        return scored.new_tensor((scored.numel() - 1) / scored.numel())
    if method == "maxrl":
        if bool((scored < 0).any()):
            raise ValueError(f"advantage=maxrl divides by the mean reward: needs rewards >= 0, found {scored.min():g}")
        return scored.mean()
    return scored.new_ones(())
