"""What every engine does around its batch: which requests wait, which policy is served and which is next, and shutdown.

An engine is a thread of its own over an `Engine`; it shares state with task threads here, under one condition.

Invariants:
* every request is resolved exactly once: with its completions, an EngineError, or EngineClosed;
* a request runs under a policy that may serve it: `min_version` or newer, or exactly `pinned_version`;
* requests pinned to the served version run to their end before a swap: it waits for those running and those pending;
* a policy that was refused is named, and requests pinned to it fail instead of waiting for it.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import EngineClosed, EngineError
from sluice.common.types import Completion
from sluice.workers.engine import EngineStats, GenerationRequest, ScoredSequence

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_IDLE_PASS_S = 1.0
"An idle loop makes a pass this often, so that `progress_at` distinguishes idle from hung."
_JOIN_S = 10.0
"Longest wait of `close` for the step in progress; a hung device must not hang the shutdown."


@dataclass(eq=False, kw_only=True, slots=True)
class SequenceGroup:
    """One request: `sampling.n` sequences of one prompt, admitted together."""

    request: GenerationRequest
    future: Future[list[Completion]] = field(default_factory=Future)
    completions: dict[int, Completion] = field(default_factory=dict)
    "those that have finished, by index"
    arrived_at: float = field(default_factory=time.monotonic)
    num_bypassed: int = 0
    "younger groups that were admitted while this one waited"

    @property
    def size(self) -> int:
        return self.request.sampling.n

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.prompt_length + self.request.sampling.max_tokens

    def fail(self, error: type[EngineError], why: str, *, cause: Exception | None = None) -> None:
        """Resolve the request with an error that names it, unless it is resolved already."""
        fail(self.future, error(f"group {self.request.group_id}: {why}"), cause=cause)


@dataclass(eq=False, kw_only=True, slots=True)
class Scoring:
    """One call of `score`."""

    sequences: Sequence[ScoredSequence]
    future: Future[tuple[int, list[NDArray[np.float32]]]] = field(default_factory=Future)
    logprobs: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    "of the sequences scored so far, by index, where an engine scores them one by one"


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPolicy:
    """A policy that an engine has received and does not serve yet."""

    version: int
    digest: str
    tensors: Mapping[str, torch.Tensor]


class Engine(ABC):
    """The operations that a rollout worker uses, and what of them does not depend on how a batch is decoded.

    Serves nothing before the first `stage`.
    """

    _thread: threading.Thread

    def __init__(self, *, in_flight: Literal["keep", "recompute", "drain"]) -> None:
        self.version = -1
        "the policy version that produces the next token; -1 before the first policy"
        self.digest = ""
        "of the served policy, as its manifest names it"
        self.progress_at = time.monotonic()
        "when the loop made its last pass: stops in a hung engine, moves every second in an idle one; -inf of one that is dead"
        self.refused: tuple[int, str] | None = None
        "the policy version staged last that could not be loaded, and why; none once another was"
        self.has_begun = threading.Event()
        "set once a policy is served, or none will be: what waits for the first one continues"
        self._in_flight = in_flight
        self._last_error: str | None = None
        self._generated_tokens = self._num_updates = 0
        self._busy_s = self._update_pause_s = self._last_pause_s = 0.0
        self._condition = threading.Condition()  # guards all below
        self._pending: list[SequenceGroup] = []
        self._running: list[SequenceGroup] = []
        self._scoring: list[Scoring] = []
        self._staged: StagedPolicy | None = None
        self._has_news = self._is_closed = False

    @abstractmethod
    def generate(self, request: GenerationRequest) -> list[Completion]:
        """Return `sampling.n` completions in order; blocks. Thread-safe. Raises EngineError, or EngineClosed when not served."""

    @abstractmethod
    def score(self, sequences: Sequence[ScoredSequence]) -> tuple[int, list[NDArray[np.float32]]]:
        """Return the served version, and its logprobs [T] at temperature 1 of each (prompt_ids [P], token_ids [T]).

        Blocks; goes before generation. Computed by the same weights and kernels, so that it shows whether a swap took effect.
        Raises EngineError (also where no policy is served yet), EngineClosed.
        """

    def stage(self, version: int, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stage a verified policy; returns at once, the swap happens between two decode steps. Replaces one staged before.

        `tensors` must not be written to afterwards: an engine may serve them in place. Versions may decrease (evaluation);
        staging the served one drops what was staged. A policy that cannot be loaded is `refused` and logged, requests pinned
        to it raise EngineError, and the served policy stays.
        """
        with self._condition:
            is_served = (version, digest) == (self.version, self.digest)
            self._staged = None if is_served else StagedPolicy(version=version, digest=digest, tensors=tensors)
            self._wake()

    def cancel(self, group_id: str) -> None:
        """Drop a group, if it is here: its `generate` raises EngineClosed, its sequences leave at the next step."""
        with self._condition:
            for group in (*self._pending, *self._running):
                if group.request.group_id == group_id:
                    group.fail(EngineClosed, "it was cancelled")
            self._wake()

    def progress(self) -> dict[str, int]:
        """Return group -> tokens generated so far, of the groups that run."""
        made: Counter[str] = Counter()
        for group, num_tokens in self._running_tokens():
            made[group.request.group_id] += num_tokens
        for group in list(self._running):
            made[group.request.group_id] += sum(len(c.token_ids) for c in list(group.completions.values()))
        return dict(made)

    def stats(self) -> EngineStats:
        """Return counters since the engine started, for heartbeats and metrics."""
        return EngineStats(
            generated_tokens=self._generated_tokens,
            running_sequences=self._count_sequences(),
            waiting_requests=len(self._pending),
            busy_s=self._busy_s,
            num_updates=self._num_updates,
            update_pause_s=self._update_pause_s,
            last_pause_s=self._last_pause_s,
        )

    def close(self) -> None:
        """Fail all requests with EngineClosed, and stop after the step in progress. Idempotent."""
        self._release_all()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning(
                "the engine's step has not ended within %.0f s; its thread is left to the process exit", _JOIN_S
            )

    # What each engine implements.

    @abstractmethod
    def _count_sequences(self) -> int: ...

    @abstractmethod
    def _running_tokens(self) -> Iterable[tuple[SequenceGroup, int]]:
        """Return the tokens of each running sequence; called beside the engine thread, so it may be a step behind."""

    @abstractmethod
    def _load(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Exchange the weights, or return why they are not a policy of this model: then the served ones are intact."""

    @abstractmethod
    def _continue_running(self) -> None:
        """After a swap: let the running sequences go on under the new policy, as `in_flight` sets."""

    # Task threads.

    def _wait_for(self, group: SequenceGroup) -> list[Completion]:
        with self._condition:
            self._check_open(f"group {group.request.group_id}")
            if self.refused is not None and group.request.pinned_version == self.refused[0]:
                raise EngineError(f"group {group.request.group_id}: {self._last_error}")
            self._pending.append(group)
            self._wake()
        return group.future.result()

    def _wait_for_score(self, sequences: Sequence[ScoredSequence]) -> tuple[int, list[NDArray[np.float32]]]:
        scoring = Scoring(sequences=sequences)
        with self._condition:
            self._check_open("score")
            self._scoring.append(scoring)
            self._wake()
        return scoring.future.result()

    # The engine thread.

    def _take_cancelled(self) -> set[SequenceGroup]:
        """Remove and return groups that ran and are resolved: their sequences have to leave."""
        with self._condition:
            dropped = {group for group in self._running if group.future.done()}
            self._pending = [group for group in self._pending if not group.future.done()]
            self._running = [group for group in self._running if group not in dropped]
        return dropped

    def _swap(self) -> None:
        """Load the staged policy, if there is one that need not wait for running or pinned requests."""
        with self._condition:
            if self._staged is None or self._must_not_swap():
                return
            policy, self._staged = self._staged, None
        started = time.monotonic()
        if problem := self._load(policy.tensors):
            self._refuse(policy, problem)
            return
        # Every later token names the new version, also in sequences that continue with keys and values of the old one.
        self.version, self.digest, self.refused = policy.version, policy.digest, None
        self.has_begun.set()
        self._num_updates += 1
        self._continue_running()
        self._last_pause_s = time.monotonic() - started
        self._update_pause_s += self._last_pause_s

    def _refuse(self, policy: StagedPolicy, why: str) -> None:
        """Record that the policy cannot be loaded, and fail the requests pinned to it."""
        self._last_error = f"policy version {policy.version} was not loaded: {why}"
        log.warning("%s; serving version %d", self._last_error, self.version)
        with self._condition:
            self.refused = policy.version, why
            for group in self._pending:
                if group.request.pinned_version == policy.version:
                    group.fail(EngineError, self._last_error)

    def _complete(self, group: SequenceGroup, index: int, completion: Completion) -> None:
        """Keep a completion; the last one resolves its group."""
        group.completions[index] = completion
        if len(group.completions) == group.size:
            with self._condition:
                self._running.remove(group)
                if not group.future.done():
                    group.future.set_result([group.completions[i] for i in range(group.size)])

    def _wait_for_news(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._has_news, timeout=_IDLE_PASS_S)
            self._has_news = False

    def _release_all(self) -> None:
        with self._condition:
            self._is_closed = True
            for group in self._running:
                group.fail(EngineClosed, "the engine was closed")
            self._release_waiting("the engine was closed")
            self._wake()

    # With the condition held.

    def _must_not_swap(self) -> bool:
        if self._in_flight == "drain" and self._running:
            return True
        return any(group.request.pinned_version == self.version for group in (*self._pending, *self._running))

    def _may_serve(self, group: SequenceGroup) -> bool:
        if self.version < 0:
            return False
        if group.request.pinned_version is not None:
            return group.request.pinned_version == self.version
        is_draining = self._in_flight == "drain" and self._staged is not None
        return self.version >= group.request.min_version and not is_draining

    def _start_running(self, admitted: list[SequenceGroup]) -> None:
        self._running += admitted
        self._pending = [group for group in self._pending if group not in admitted]

    def _fail_running(self, error: Exception) -> None:
        assert self._last_error is not None
        for group in self._running:
            group.fail(EngineError, self._last_error, cause=error)
        self._running = []

    def _release_waiting(self, why: str) -> None:
        self.has_begun.set()
        for group in self._pending:
            group.fail(EngineClosed, why)
        for scoring in self._scoring:
            fail(scoring.future, EngineClosed(f"score: {why}"))
        self._scoring = []

    def _check_open(self, what: str) -> None:
        if self._is_closed:
            raise EngineClosed(f"{what}: the engine is closed")

    def _wake(self) -> None:
        self._has_news = True
        self._condition.notify_all()


def fail(future: Future, error: EngineError, *, cause: Exception | None = None) -> None:
    """Resolve a future with an error, unless it is resolved already."""
    error.__cause__ = cause
    if not future.done():
        future.set_exception(error)


def version_spans(version_starts: list[tuple[int, int]], *, end: int) -> tuple[tuple[int, int], ...]:
    """Convert (version, position from which on it samples) to runs (version, tokens); versions without a token are omitted."""
    ends = [start for _, start in version_starts[1:]] + [end]
    spans = [(version, stop - start) for (version, start), stop in zip(version_starts, ends, strict=True)]
    return tuple(span for span in spans if span[1])
