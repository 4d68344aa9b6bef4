"""Dying with the process that started this one, whatever ends it: a request to the kernel (Linux only)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, *, number: int = signal.SIGKILL) -> None:
    """From now on this process gets signal `number` when `parent` ends; it exits at once where that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
