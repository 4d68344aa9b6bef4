"""A child that is a fork of this process and runs a Python command line: it has everything that this process imported.

    fork(Command(argv=[python, "-m", "sluice.trainer"], ...)) --> the child, as a ForkedProcess; in the child it never returns

Call it while this process has one thread and has not touched CUDA. The child is what `spawn` would have made of the same
command line: a process group of its own, the death signal, its output in the log, its own environment and working directory,
the command line that `ps` shows, and no random numbers in common with its siblings. What is read once, when Python or torch
starts (PYTHONPATH, PYTHONWARNINGS, OPENBLAS_NUM_THREADS, ...), comes from this process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sluice.common.parent import die_with, ended_by_ctrl_c

_WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_DEFAULTS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""As every role has them (`Supervisor`)."""


@contextmanager
def imports_without_threads() -> Iterator[None]:
    """Keep libraries from starting threads at import, for a process that will fork."""
    before = dict(os.environ)
    os.environ.update({**_DEFAULTS, **before, **_WITHOUT_THREADS})
    try:
        with ended_by_ctrl_c():
            yield
    finally:
        for name in {**_DEFAULTS, **_WITHOUT_THREADS}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What a child is to run."""

    argv: list[str]
    "`python [-P] -m MODULE ...`, `python -c PROGRAM ...` or `python FILE ...`"
    env: dict[str, str]
    "its full environment"
    cwd: str = "."
    stdout: str | None = None
    "file that its output is appended to; none = where ours goes"
    stderr: str | None = None
    title: list[str] | None = None
    "what `ps` shows; none = argv"


class ForkedProcess:
    """A child, with the methods of Popen that a supervisor uses."""

    def __init__(self, pid: int, exit_code: Callable[[], int | None]) -> None:
        """`exit_code` asks the parent: negative for a signal; None while it runs."""
        self.pid, self._exit_code = pid, exit_code
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._exit_code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises TimeoutExpired."""
        deadline, pause_s = time.monotonic() + (timeout or 0.0), 0.001
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:  # not reaped, so the pid is its own; its parent, which may hang, is not asked
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(command: Command, *, close: int | None = None) -> ForkedProcess:
    """Start the child. `close` is a file descriptor that it must not keep."""
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _be_the_child(command, parent, close)
    with suppress(OSError):  # the child does it as well; either may be first
        os.setpgid(pid, pid)
    return ForkedProcess(pid, partial(wait_for, pid))


def _be_the_child(command: Command, parent: int, close: int | None) -> NoReturn:
    try:
        die_with(parent)
        if close is not None:
            os.close(close)
        _become(command)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    _exit_with(_run(command.argv))


def wait_for(pid: int) -> int | None:
    """Reap a child; return its exit code, negative for a signal; None while it runs."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # reaped before, and the reply was lost
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status) if found else None


def _become(command: Command) -> None:
    with suppress(OSError):
        os.setpgid(0, 0)
    os.chdir(command.cwd)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    streams = ((os.devnull, os.O_RDONLY), (command.stdout, append), (command.stderr, append))
    for descriptor, (path, flags) in enumerate(streams):
        if path is not None:
            opened = os.open(path, flags, 0o666)
            os.dup2(opened, descriptor)
            os.close(opened)
    os.environ.clear()
    os.environ.update(command.env)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    set_title(command.title or command.argv)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python reseeds its own generator; torch's is seeded by the code that draws
    threads = command.env.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and threads.isdigit():
        sys.modules["torch"].set_num_threads(int(threads))


def _run(argv: list[str]) -> int:
    """Run the command line as Python would; return the exit code."""
    # neither the current folder nor that of a program is on the path here
    words = argv[2:] if argv[1] == "-P" else argv[1:]
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _exit_with(code: int) -> NoReturn:
    """End as an interpreter does, but without unwinding the frames of the process that this one is a fork of."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code & 0xFF)


def set_title(words: list[str]) -> None:
    """Write a command line where `ps` reads it, over this process' own, cut to its length (Linux only)."""
    if sys.platform != "linux":
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 of proc(5)
    if begin and end > begin:
        title = "\0".join([Path(words[0]).name, *words[1:]]).encode()[: end - begin - 1]
        ctypes.memmove(begin, title.ljust(end - begin, b"\0"), end - begin)
