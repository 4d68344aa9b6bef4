"""One request and its running sequences: the host's side of what `running_batch` decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.common.types import SamplingParams
from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.stop_strings import StopStrings


@dataclass(eq=False, kw_only=True, slots=True)
class RunningSequence:
    """One running completion, on the host; its row is its index in `RunningBatch.sequences`."""

    group: SequenceGroup
    index: int
    "index in the group"
    offset: int
    "sequence length minus the batch's step count: constant while it runs"
    version_starts: list[tuple[int, int]]
    "(policy version, sequence length from which on it samples)"
    stop_strings: StopStrings | None = None
    "none = it has no stop texts"


def features(sampling: SamplingParams) -> list[str]:
    """Return the names of what a request asks for that costs extra."""
    is_truncated = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    asked = {"temperature": sampling.temperature != 1, "truncation": is_truncated, "stop": bool(sampling.stop)}
    return [name for name, is_asked in asked.items() if is_asked]


def parameters(sampling: SamplingParams) -> tuple[float, ...]:
    """Return temperature, top_k, top_p and min_p, in the order of `BatchTensors`; a greedy row cuts nothing."""
    if sampling.temperature == 0:
        return 0.0, 0.0, 1.0, 0.0
    return sampling.temperature, float(sampling.top_k), sampling.top_p, sampling.min_p


def noise(group: SequenceGroup) -> Tensor:
    """Draw all uniforms of a group, [group size, max_tokens], on the CPU: the same for every device."""
    sampling = group.request.sampling
    return torch.rand(sampling.n, sampling.max_tokens, generator=torch.Generator().manual_seed(sampling.seed))
