"""What every engine does around its batch: who waits, which policy is served and which comes next, and how it all ends.

An engine is a thread of its own over a `ServingEngine`; task threads meet it here, under one condition.

Invariants:
* every request is resolved exactly once: with its completions, an EngineError, or EngineClosed;
* a request runs under a policy that may serve it: `min_version` or newer, or exactly `pinned_version`;
* requests pinned to the served version run to their end before a swap: it waits for those running and those pending;
* a policy that was refused is named, and who is pinned to it fails instead of waiting for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from sluice.common.errors import EngineClosed, EngineError
from sluice.common.types import Completion
from sluice.workers.engine import EngineStats, GenerationRequest

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_IDLE_PASS_S = 1.0
"An idle loop passes this often, so that `progress_at` tells idle from hung."
_JOIN_S = 10.0
"`close` waits so long for the step in progress; a hung device must not hang the shutdown."


@dataclass(eq=False, kw_only=True, slots=True)
class ServedGroup:
    """One request, and what of it is finished."""

    request: GenerationRequest
    future: Future[list[Completion]] = field(default_factory=Future)
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.request.sampling.n

    @property
    def is_complete(self) -> bool:
        return len(self.completions) == self.size

    def fail(self, error: type[EngineError], why: str, *, cause: Exception | None = None) -> None:
        """Resolve it with an error that names it, unless it is resolved already."""
        failure = error(f"group {self.request.group_id}: {why}")
        failure.__cause__ = cause
        fail(self.future, failure)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPolicy:
    """A policy that an engine was handed and does not serve yet."""

    version: int
    digest: str
    tensors: Mapping[str, torch.Tensor]


Group = TypeVar("Group", bound=ServedGroup)


class ServingEngine(Generic[Group]):
    """The part of `workers.engine.Engine` that does not depend on how a batch is decoded. Serves nothing before `stage`."""

    _thread: threading.Thread

    def __init__(self, *, in_flight: Literal["keep", "recompute", "drain"]) -> None:
        self._in_flight = in_flight
        self._version, self._digest = -1, ""
        self._progress_at = time.monotonic()
        self._last_error: str | None = None
        self._refused: tuple[int, str] | None = None
        self._generated_tokens = self._num_updates = 0
        self._busy_s = self._update_pause_s = self._last_pause_s = 0.0
        self._condition = threading.Condition()  # guards all below
        self._pending: list[Group] = []
        self._running: list[Group] = []
        self._staged: StagedPolicy | None = None
        self._has_news = self._is_closed = False

    @property
    def version(self) -> int:
        """The policy version that produces the next token; -1 before the first policy."""
        return self._version

    @property
    def digest(self) -> str:
        """Digest of the served policy."""
        return self._digest

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the loop's last pass; -inf of an engine that is dead."""
        return self._progress_at

    @property
    def refused(self) -> tuple[int, str] | None:
        """The policy version staged last that could not be loaded, and why; none once another was."""
        return self._refused

    @property
    def last_error(self) -> str | None:
        """The last failure of a step or of a policy swap, for people; none = there was none."""
        return self._last_error

    def stage(self, version: int, digest: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Serve this policy from the next step on that may swap; returns at once. Replaces one staged before.

        Versions may go back (evaluation); the served one drops what was staged. A policy that cannot be loaded is reported
        in `refused`, `last_error` and the log, and the served one stays.
        """
        with self._condition:
            is_served = (version, digest) == (self._version, self._digest)
            self._staged = None if is_served else StagedPolicy(version=version, digest=digest, tensors=tensors)
            self._wake()

    def cancel(self, group_id: str) -> None:
        """Give up a group, if it is here: its `generate` raises EngineClosed, its sequences leave at the next step."""
        with self._condition:
            for group in (*self._pending, *self._running):
                if group.request.group_id == group_id:
                    group.fail(EngineClosed, "it was cancelled")
            self._wake()

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
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
        """Release everyone inside with EngineClosed, and stop after the step in progress. Idempotent."""
        self._release_all()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning(
                "the engine's step has not ended within %.0f s; its thread is left to the process exit", _JOIN_S
            )

    # What an engine says of itself.

    def _count_sequences(self) -> int:
        raise NotImplementedError

    def _release_scores(self, why: str) -> None:
        """Fail who waits for a score; with the condition held."""
        raise NotImplementedError

    # Task threads.

    def _wait_for(self, group: Group) -> list[Completion]:
        with self._condition:
            self._check_open(f"group {group.request.group_id}")
            if self._refused is not None and group.request.pinned_version == self._refused[0]:
                raise EngineError(f"group {group.request.group_id}: {self._last_error}")
            self._pending.append(group)
            self._wake()
        return group.future.result()

    # The engine thread.

    def _take_cancelled(self) -> set[Group]:
        """Groups that ran and are resolved: their sequences have to leave."""
        with self._condition:
            dropped = {group for group in self._running if group.future.done()}
            self._pending = [group for group in self._pending if not group.future.done()]
            self._running = [group for group in self._running if group not in dropped]
        return dropped

    def _take_staged(self) -> StagedPolicy | None:
        """The staged policy, if it need not wait for running or pinned requests."""
        with self._condition:
            if self._staged is None or self._must_not_swap():
                return None
            policy, self._staged = self._staged, None
            return policy

    def _serve(self, policy: StagedPolicy) -> None:
        """It is loaded."""
        self._version, self._digest, self._refused = policy.version, policy.digest, None
        self._num_updates += 1

    def _count_pause(self, *, since: float) -> None:
        self._last_pause_s = time.monotonic() - since
        self._update_pause_s += self._last_pause_s

    def _refuse(self, policy: StagedPolicy, why: str) -> None:
        """It cannot be loaded."""
        self._last_error = f"policy version {policy.version} was not loaded: {why}"
        log.warning("%s; serving version %d", self._last_error, self._version)
        with self._condition:
            self._refused = policy.version, why
            for group in self._pending:
                if group.request.pinned_version == policy.version:
                    group.fail(EngineError, self._last_error)

    def _finish(self, group: Group) -> None:
        """All its completions are there."""
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
        return any(group.request.pinned_version == self._version for group in (*self._pending, *self._running))

    def _may_serve(self, group: Group) -> bool:
        if self._version < 0:
            return False
        if group.request.pinned_version is not None:
            return group.request.pinned_version == self._version
        is_draining = self._in_flight == "drain" and self._staged is not None
        return self._version >= group.request.min_version and not is_draining

    def _start_running(self, admitted: list[Group]) -> None:
        self._running += admitted
        self._pending = [group for group in self._pending if group not in admitted]

    def _fail_running(self, error: Exception) -> None:
        assert self._last_error is not None
        for group in self._running:
            group.fail(EngineError, self._last_error, cause=error)
        self._running = []

    def _release_waiting(self, why: str) -> None:
        for group in self._pending:
            group.fail(EngineClosed, why)
        self._release_scores(why)

    def _check_open(self, what: str) -> None:
        if self._is_closed:
            raise EngineClosed(f"{what}: the engine is closed")

    def _wake(self) -> None:
        self._has_news = True
        self._condition.notify_all()


def fail(future: Future, error: EngineError) -> None:
    """Resolve a future with an error, unless it is resolved already."""
    if not future.done():
        future.set_exception(error)


def version_spans(version_starts: list[tuple[int, int]], *, end: int) -> tuple[tuple[int, int], ...]:
    """Run lengths (version, tokens) from (version, place from which on it samples); one that sampled nothing is left out."""
    ends = [start for _, start in version_starts[1:]] + [end]
    spans = [(version, stop - start) for (version, start), stop in zip(version_starts, ends, strict=True)]
    return tuple(span for span in spans if span[1])
