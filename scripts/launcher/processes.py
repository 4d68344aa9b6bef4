"""Child processes that never outlive their parent, whatever ends it.

Each child leads a process group of its own (so Ctrl-C in the terminal reaches only the supervisor, which ends its
children in order) and asks the kernel for a signal when its parent dies, also by SIGKILL. For a role that signal is
SIGKILL: its work is in Redis or in a checkpoint, and it must not wait for a Redis that dies with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from sluice.common.parent import die_with, stop_signals
from sluice.scripts.launcher.forked import ForkedProcess

Process = subprocess.Popen[bytes] | ForkedProcess
"""What a supervisor knows of a child."""


def spawn(
    argv: list[str],
    *,
    log: Path,
    env: Mapping[str, str],
    at_parents_death: int = signal.SIGKILL,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a child whose output is appended to `log`; `env` is added to ours. Call it from the main thread."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,
            pass_fds=pass_fds,
            preexec_fn=lambda: die_with(parent, number=at_parents_death),
        )


def signal_group(process: Process, number: int) -> None:
    """Send a signal to the child and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


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
