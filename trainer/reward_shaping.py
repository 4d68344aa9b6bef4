"""What of an episode reaches the loss: its tokens, and its reward less the penalty for length.

Legend: G = completions of one group, T = completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.common.config import Config
from sluice.common.types import Episode, Group


def loss_tokens(episode: Episode, *, mask_truncated: bool) -> NDArray[np.bool_]:
    """Return which tokens of a completion are in the loss, bool [T].

    None where the episode has no reward or, with mask_truncated, ran into the bound on its length (TRL's
    mask_truncated_completions). Otherwise all but those of `tool_spans`, which the policy did not choose.
    """
    completion = episode.completion
    is_left_out = mask_truncated and completion.finish_reason == "length"
    in_loss = np.full(len(completion.token_ids), episode.reward is not None and not is_left_out)
    for first, count in completion.tool_spans:
        assert 0 <= first <= first + count <= len(in_loss), f"tool span {first}+{count} in {len(in_loss)} tokens"
        in_loss[first : first + count] = False
    return in_loss


def overlong_penalty(num_tokens: int, *, max_res_tokens: int, buffer_tokens: int, penalty: float = 1.0) -> float:
    """Return what a completion's length costs, in [0, penalty]: `penalty * clip((T - (L - buffer)) / buffer, 0, 1)`.

    T = num_tokens, L = max_res_tokens. DAPO, arXiv:2503.14476, equation 13 with the sign turned and its 1 a parameter.
    Example: 90 tokens, L = 100, buffer = 20 -> 0.5.
    """
    excess = (num_tokens - (max_res_tokens - buffer_tokens)) / buffer_tokens
    return penalty * min(max(excess, 0.0), 1.0)


def rewards_of(group: Group, config: Config) -> Tensor:
    """Return what advantages are computed from: rewards less overlong penalties, float32 [G]; nan = unscorable."""
    rewards = [math.nan if episode.reward is None else episode.reward for episode in group.episodes]
    return torch.tensor(rewards) - torch.tensor(_penalties(group.episodes, config))


def mask_metrics(groups: Sequence[Group], config: Config) -> dict[str, float]:
    """Return how much of a batch is left out of the loss, and the mean penalty where one is configured."""
    episodes = [episode for group in groups for episode in group.episodes]
    masks = [loss_tokens(episode, mask_truncated=config.trainer.mask_truncated) for episode in episodes]
    tool_tokens = sum(count for episode in episodes for _, count in episode.completion.tool_spans)
    metrics = {
        "completions/masked_ratio": fmean(not mask.any() for mask in masks),
        "completions/tool_token_ratio": tool_tokens / max(1, sum(len(mask) for mask in masks)),
    }
    if config.trainer.overlong_penalty is not None:
        metrics["reward/overlong_penalty/mean"] = -fmean(_penalties(episodes, config))
    return metrics


def _penalties(episodes: Sequence[Episode], config: Config) -> list[float]:
    overlong = config.trainer.overlong_penalty
    if overlong is None:
        return [0.0] * len(episodes)
    return [
        overlong_penalty(
            len(episode.completion.token_ids),
            max_res_tokens=config.sampling.max_res_tokens,
            buffer_tokens=overlong.buffer_tokens,
            penalty=overlong.penalty,
        )
        for episode in episodes
    ]
