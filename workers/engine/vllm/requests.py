"""What is asked of the vLLM engine, as it is on its way: groups, their sequences, scores. No threads, no vLLM."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import EngineError
from sluice.common.types import Completion, FinishReason
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import ServedGroup, version_spans
from sluice.workers.engine.vllm.core import Finished, is_temperature

_PRIORITY_S = 10.0
"One step of priority is worth so many seconds of waiting."


@dataclass(eq=False, kw_only=True, slots=True)
class SequenceGroup(ServedGroup):
    """One request, as it waits its turn."""

    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def urgency(self) -> float:
        """The least goes first."""
        return self.arrived_at - _PRIORITY_S * self.request.priority


@dataclass(eq=False, kw_only=True, slots=True)
class RunningSequence:
    """One completion that is in vLLM."""

    group: SequenceGroup
    index: int
    "place in the group"
    version_starts: list[tuple[int, int]]
    "(policy version, number of tokens from which on it samples)"


@dataclass(eq=False, kw_only=True, slots=True)
class Score:
    """One call of `score`."""

    sequences: list[NDArray[np.int32]]
    "prompt and completion of each"
    future: Future[tuple[int, dict[int, NDArray[np.float32]]]] = field(default_factory=Future)
    logprobs: dict[int, NDArray[np.float32]] = field(default_factory=dict)


def check_temperature(request: GenerationRequest) -> None:
    """Raises EngineError for what vLLM would refuse, or silently change."""
    temperature = request.sampling.temperature
    if temperature and not is_temperature(temperature):
        raise EngineError(
            f"group {request.group_id}: vLLM samples at temperature 0 or 0.01 to 2.0, found {temperature}"
        )


def completion_of(row: RunningSequence, finished: Finished) -> Completion:
    reason: FinishReason = "stop" if finished.reason == "stop" else "length"
    return Completion(
        token_ids=finished.token_ids,
        rollout_logprobs=finished.logprobs,
        policy_versions=version_spans(row.version_starts, end=len(finished.token_ids)),
        finish_reason=reason,
    )
