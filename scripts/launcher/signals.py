"""Ctrl-C and SIGTERM as a flag, for commands that end gracefully."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sluice.common.parent import stop_signals


@contextmanager
def interrupted_by_signals() -> Iterator[Callable[[], bool]]:
    """Set a flag on Ctrl-C, SIGTERM and a closed terminal; a second one interrupts."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
