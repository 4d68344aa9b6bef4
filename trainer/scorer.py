"""The model being trained as a scorer: logprobs of completions as they were sampled, with gradients.

Legend: B = sequences, T = completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sluice.common.config import SamplingConfig
from sluice.common.models.logprobs import completion_logprobs
from sluice.common.models.truncation import Truncation
from sluice.common.types import SamplingParams


class Scorer(torch.nn.Module):
    """A model's logprobs and their entropy as one module: what wrappers for many GPUs wrap, because all runs inside it."""

    def __init__(
        self, model: Any, *, autocast: str, sampling: SamplingConfig | None, end_token_ids: Sequence[int]
    ) -> None:
        """Wrap a model. sampling: the parameters that the run was created with; none = full softmax at temperature 1."""
        super().__init__()
        self.model = model
        self._autocast, self._sampling, self._end_token_ids = autocast, sampling, end_token_ids

    def forward(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        completion_lengths: Tensor,
        *,
        for_loss: bool = True,
        sampling: SamplingParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return logprobs [B, T] and, for a loss, entropy [B, T]; otherwise those of the full softmax at temperature 1.

        sampling: parameters of these rows; none = those that the run was created with.
        """
        options: dict[str, Any] = {"with_entropy": for_loss}
        sampled_with = sampling or self._sampling
        if for_loss and sampled_with is not None:
            options["temperature"] = sampled_with.temperature
            options["truncation"] = Truncation.of(sampled_with, end_token_ids=self._end_token_ids)
        with autocast(input_ids.device, self._autocast):
            return completion_logprobs(self.model, input_ids, prompt_lengths, completion_lengths, **options)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Compute in `trainer.autocast`."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
