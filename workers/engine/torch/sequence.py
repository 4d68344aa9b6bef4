"""One request and its running completions: the host's side of what `batch` decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.common.types import SamplingParams
from sluice.workers.engine.serving import ServedGroup
from sluice.workers.engine.torch.stop_strings import StopStrings


@dataclass(eq=False, kw_only=True, slots=True)
class SequenceGroup(ServedGroup):
    """One request, as it competes for room."""

    num_bypassed: int = 0
    "younger groups that were admitted while this one waited"

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion at the most."""
        return self.prompt_length + self.request.sampling.max_tokens


@dataclass(eq=False, kw_only=True, slots=True)
class RunningSequence:
    """The host's side of one running completion."""

    group: SequenceGroup
    index: int
    "place in the group"
    offset: int
    "sequence length less the batch's step count: constant while the row runs"
    version_starts: list[tuple[int, int]]
    "(policy version, sequence length from which on it samples)"
    stop_strings: StopStrings | None = None
    "none = it has no stop texts"


def features(sampling: SamplingParams) -> list[str]:
    """What a request asks for that costs extra."""
    is_truncated = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    asked = {
        "temperature": sampling.temperature != 1,
        "truncation": is_truncated,
        "stop": bool(sampling.stop),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def parameters(sampling: SamplingParams) -> tuple[float, ...]:
    """In the order of `BatchTensors`; a greedy row cuts nothing."""
    if sampling.temperature == 0:
        return 0.0, 0.0, 1.0, 0.0
    return sampling.temperature, float(sampling.top_k), sampling.top_p, sampling.min_p


def noise(group: SequenceGroup) -> Tensor:
    """All uniforms of a group, [group size, max_tokens], on the CPU: the same on every device."""
    sampling = group.request.sampling
    return torch.rand(sampling.n, sampling.max_tokens, generator=torch.Generator().manual_seed(sampling.seed))
