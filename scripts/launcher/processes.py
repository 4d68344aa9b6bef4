"""Child processes that never outlive their parent, whatever ends it.

Each child leads a process group of its own (so Ctrl-C in the terminal reaches only the supervisor, which ends its
children in order) and asks the kernel for a signal when its parent dies, also by SIGKILL. For a role that signal is
SIGKILL: its work is in Redis or in a checkpoint, and it must not wait for a Redis that dies with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sluice.common.parent import die_with


class Process(Protocol):
    """What a supervisor knows of a child: a `Popen`, or a `ForkedProcess`."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless the process has ended."""

    def kill(self) -> None:
        """Send SIGKILL."""


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
