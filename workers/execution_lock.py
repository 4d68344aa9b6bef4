"""Which stages run together in one worker process: most share it, one that has killed a process before runs alone.

An exclusive lock has priority: new shared ones wait until it is released, and it waits until the present ones are released.
No thread waits here while holding a claim, so that no lease runs for a stage that is not worked on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 600.0
"""Longest wait for the lock. A stage that does not get it stays pending, and the reaper sends it again."""


class ExecutionLock:
    """`with lock.held(exclusive=...) as acquired`; false: not acquired within WAIT_S."""

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._want_exclusive = 0
        "threads that wait for the exclusive lock, and the one that holds it"
        self._wait_s = wait_s

    @contextmanager
    def held(self, *, exclusive: bool) -> Iterator[bool]:
        with self._changed:
            self._want_exclusive += exclusive
            may_enter = (lambda: self._inside == 0) if exclusive else (lambda: self._want_exclusive == 0)
            acquired = self._changed.wait_for(may_enter, self._wait_s)
            self._inside += acquired
        try:
            yield acquired
        finally:
            with self._changed:
                self._inside -= acquired
                self._want_exclusive -= exclusive
                self._changed.notify_all()
