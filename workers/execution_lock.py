"""Who works beside whom in one worker process: most parts share it, one that has killed before has it to itself.

Whoever waits to be alone goes first: newcomers wait outside until it is out, and it waits until those inside are out.
Nobody waits outside while holding a claim, so that no lease runs for a part that is not worked on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 600.0
"""Longest wait to get in. A part that does not is owed still, and the reaper sends it again."""


class ExecutionLock:
    """`with lock.shared() as acquired`, `with lock.exclusive() as acquired`; false: did not get in within WAIT_S."""

    def __init__(self, wait_s: float = WAIT_S) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._want_exclusive = 0
        "those that wait to be alone, and the one that is"
        self._wait_s = wait_s

    @contextmanager
    def shared(self) -> Iterator[bool]:
        with self._changed:
            acquired = self._changed.wait_for(lambda: self._want_exclusive == 0, self._wait_s)
            self._inside += acquired
        try:
            yield acquired
        finally:
            with self._changed:
                self._inside -= acquired
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        with self._changed:
            self._want_exclusive += 1
            acquired = self._changed.wait_for(lambda: self._inside == 0, self._wait_s)
            self._inside += acquired
        try:
            yield acquired
        finally:
            with self._changed:
                self._inside -= acquired
                self._want_exclusive -= 1
                self._changed.notify_all()
