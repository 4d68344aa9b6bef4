"""Ending with the process that started this one, whatever ends it: a request to the kernel (Linux only)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, *, number: int = signal.SIGKILL) -> None:
    """Ask for signal `number` when `parent` ends; exit at once where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)
