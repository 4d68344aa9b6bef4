"""What ends a process of ours: the death of the one that started it (Linux only), a signal, a closed terminal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, *, number: int = signal.SIGKILL) -> None:
    """Ask for signal `number` when `parent` ends; exit at once where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once and without a word, while there is nothing to end in order.

    For imports and checks: a library may swallow the KeyboardInterrupt that is raised amid them, and so does any `__del__`.
    Where Ctrl-C has another meaning (a handler of ours, `nohup sluice ... &`) it keeps it.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_signals() -> list[int]:
    """Return the signals that ask for an orderly end: Ctrl-C, SIGTERM, and a closed terminal's, but under `nohup`."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]
