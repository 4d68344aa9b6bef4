"""The supervisor of a run, started by a user's program: a process of its own, whose words are read from a file.

start --> keeper thread: Popen (no Python between fork and exec), then waits for its end
child --> <run folder>/logs/run.log: what `sluice run` says where it is not in a terminal
      --> <run folder>/metrics.jsonl: the trainer's steps
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sluice.common.errors import ConfigError, RunFailed, SluiceError
from sluice.scripts.launcher.roles import PYTHON

_OF_NOTEBOOKS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "MPLBACKEND")
"""Variables that a notebook's kernel sets for its own output."""
_STEP = re.compile(r"step \d+/\d+  ")
_ERROR = "error: "
START_S = 60.0
"""How long the operating system may take to start a process."""


class RunProcess:
    """One `sluice run`, in a process group of its own: a Ctrl-C in the terminal reaches only the program."""

    def __init__(self, arguments: list[str], *, folder: Path) -> None:
        """Start it. Raises SluiceError where the system refuses."""
        self.log = folder / "logs" / "run.log"
        self.log.parent.mkdir(exist_ok=True, mode=0o700)
        self._argv = [*PYTHON, "-m", f"{__package__}.child", str(os.getpid()), "run", *arguments]
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        self._process: subprocess.Popen[bytes] | None = None
        self._told = self._begin
        self._refused: OSError | None = None
        self._has_started = threading.Event()
        self._owner = os.getpid()
        threading.Thread(target=self._keep, name="sluice-run", daemon=True).start()
        if not self._has_started.wait(START_S) or self._process is None:
            raise SluiceError(f"the run could not be started: {self._refused or 'no process within a minute'}")

    def _keep(self) -> None:
        env = {name: value for name, value in os.environ.items() if name not in _OF_NOTEBOOKS}
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                self._process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=descriptor,
                    env=env | {"PYTHONUNBUFFERED": "1"},
                    process_group=0,
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            self._refused = error
        self._has_started.set()
        if self._process:
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, and is ours: a fork of the program that started it has nothing to say to it."""
        return self._owner == os.getpid() and self.poll() is None

    def interrupt(self, *, number: int = signal.SIGINT) -> None:
        """Do what Ctrl-C does to `sluice run`: the first ends the run in order, the second at once."""
        assert self._process is not None
        if self.is_alive:
            self._process.send_signal(number)

    def news(self) -> list[str]:
        """Return the lines since the last call, up to an error, which `check` raises."""
        lines, self._told = self._lines(self._told)
        errors = (number for number, line in enumerate(lines) if line.startswith(_ERROR))
        return lines[: next(errors, None)]

    def _lines(self, start: int) -> tuple[list[str], int]:
        """Return the complete lines from a byte on, and the byte after them."""
        with self.log.open("rb") as file:
            start = min(start, os.fstat(file.fileno()).st_size)  # the supervisor cuts long logs
            file.seek(start)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        return complete.decode(errors="replace").splitlines(), start + len(complete)

    def check(self, *, name: str) -> None:
        """Raise what the command line would end with: ConfigError for bad input, RunFailed for a run that has failed."""
        code = self.poll()
        if code in (None, 0, 130, -signal.SIGINT):  # before it has anything to end in order it just ends
            return
        lines, _ = self._lines(self._begin)
        begins = next((number for number, line in enumerate(lines) if line.startswith(_ERROR)), None)
        if begins is not None:
            text = "\n".join(lines[begins:]).removeprefix(_ERROR)
        elif code is not None and code < 0:
            killed = signal.Signals(-code).name
            text = (
                f"run {name} was ended by {killed}; its newest checkpoint is kept, and resume=... continues from there"
            )
        else:
            text = f"run {name} ended with exit code {code}; {self.log} ends:\n" + "\n".join(lines[-15:])
        raise ConfigError(text) if code == 2 else RunFailed(text, exit_code=code or 1)


class Follower:
    """What is new in the files of a run: said to one function, steps to another."""

    def __init__(
        self,
        folder: Path,
        *,
        process: RunProcess | None,
        say: Callable[[str], None],
        step: Callable[[dict[str, Any]], None],
    ) -> None:
        """Follow from the first step and word on."""
        self._process, self._say, self._step = process, say, step
        self._metrics = folder / "metrics.jsonl"
        self._at = 0

    def update(self) -> None:
        """Tell what is new."""
        for line in self._process.news() if self._process else ():
            if not _STEP.match(line):  # of these the trainer's own file has all
                self._say(line)
        for metrics in self._new_steps():
            self._step(metrics)

    def _new_steps(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        with self._metrics.open("rb") as file:
            if self._at > os.fstat(file.fileno()).st_size:  # it was rotated
                self._at = 0
            file.seek(self._at)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._at += len(complete)
        entries = [json.loads(line) for line in complete.splitlines()]
        return [entry for entry in entries if "reward/mean" in entry]
