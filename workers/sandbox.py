"""Running an untrusted Python program: in a process of its own, with the isolation that this machine offers.

    files      bubblewrap (`bwrap`): sees the interpreter, an empty /tmp and nothing else; also all of `network`
    network    util-linux' `unshare`: no network and no unix socket, its own process ids, which all end with it; sees this
               user's files
    limits     where neither works: time, memory, file size only

Always: an empty environment; CPU seconds, address space, file size and open files bounded; the memory of all processes
together where a control group can be made; one wall-clock limit, which begins with the program, after which all that it started
is killed. It ends with this process.

What runs first there (workers/sandbox_start.py) reports over a pipe that the program has started: before, a failure is the
sandbox's and raises SandboxError; afterwards, whatever is printed or returned, it is the program's. It marks in shared memory
which tests passed: a program that closes every descriptor is scored as any other.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from secrets import token_bytes
from typing import IO, Any, Literal

from sluice.common.errors import RewardError
from sluice.common.parent import die_with
from sluice.workers.memory_group import MemoryGroup, memory_group

Isolation = Literal["limits", "network", "files"]
LEVELS: tuple[Isolation, ...] = ("limits", "network", "files")
MAX_FILE = 16 * 1024 * 1024
"Bytes of a file, what is printed included."
MAX_PROCESSES = 32
_START_S = 20.0
"""A sandbox that has not started its program by then has failed."""
_STARTED = b"started\n"
_START = Path(__file__).with_name("sandbox_start.py").read_text()
_PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-c"]


class SandboxError(RewardError):
    """The sandbox itself failed: an infrastructure failure, never a score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a program."""

    output: str
    "standard output, the first MAX_FILE bytes"
    passed: frozenset[int]
    "numbers of the tests that passed"
    timed_out: bool


@cache
def available() -> Isolation:
    """Return the strictest level that works here; tried once."""
    for level in reversed(LEVELS[1:]):
        with suppress(SandboxError):
            run_python("", timeout_s=_START_S, memory_mib=512, isolation=level)
            return level
    return "limits"


def run_python(
    program: str, *, tests: Sequence[str] = (), stdin: str = "", timeout_s: float, memory_mib: int, isolation: Isolation
) -> Outcome:
    """Run a program, and then each test in its place, to their end or their limit. Raises SandboxError.

    It reads `stdin` as a file. `program` and `tests` are in no file or command line that it could read.
    """
    nonce = token_bytes(16)
    given = {
        "program": program,
        "tests": list(tests),
        "nonce": nonce,
        # counted per user namespace, so this bounds the program alone; the machine's root is exempt
        "max_processes": 0 if isolation == "limits" else MAX_PROCESSES,
        "may_connect": isolation == "limits",
    }
    try:
        with (
            _folder() as folder,
            _file(marshal.dumps(given)) as source,
            _file(stdin.encode(errors="replace")) as read,
            _file() as printed,
            _file() as errors,
            _file(bytes(len(nonce) * max(1, len(tests)))) as marks,  # an empty file cannot be mapped
            _report() as (reader, report),
            memory_group(memory_mib << 20) as group,
        ):
            passed_on = source.fileno(), report.fileno(), marks.fileno()
            argv = [*_wrapper(isolation), *_PYTHON, f"{_START}\nstart{passed_on}"]
            limits = _limits(os.getpid(), group, timeout_s=timeout_s, memory_mib=memory_mib)
            with _process(
                argv, stdin=read, stdout=printed, stderr=errors, cwd=folder, preexec_fn=limits, pass_fds=passed_on
            ) as process:
                source.close()
                report.close()
                if not select.select([reader], [], [], _START_S)[0] or not reader.read(len(_STARTED)):
                    raise SandboxError(f"the sandbox could not be started: {_last_line(errors)}")
                timed_out = _is_over_time(process, timeout_s)
            marks.seek(0)
            passed = frozenset(i for i in range(len(tests)) if marks.read(len(nonce)) == nonce)
            return Outcome(output=_text(printed), passed=passed, timed_out=timed_out)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the sandbox could not be started: {error}") from None


@contextmanager
def _process(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process; kill it and its process group in the end."""
    env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    process = subprocess.Popen(argv, env=env, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _is_over_time(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for its end; Popen.wait would look every 50 ms, which is longer than most programs run."""
    with suppress(AttributeError, OSError), FileIO(os.pidfd_open(process.pid)) as end:  # Linux 5.3
        select.select([end], [], [], timeout_s)
        return process.poll() is None
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return True
    return False


@contextmanager
def _folder() -> Iterator[str]:
    """Make a folder, and remove it whatever a program has left there."""
    folder = tempfile.mkdtemp(prefix="sluice-sandbox-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # deeper than Python can follow, or closed to its owner
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, folder], capture_output=True, check=False)


@contextmanager
def _file(content: bytes = b"") -> Iterator[IO[bytes]]:
    """Open a file without a name with this content, at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file


@contextmanager
def _report() -> Iterator[tuple[FileIO, FileIO]]:
    """Open a pipe: its end to read from, and the other."""
    reader, writer = os.pipe()
    with FileIO(reader, "r") as read, FileIO(writer, "w") as write:
        yield read, write


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MAX_FILE).decode(errors="replace")


def _last_line(errors: IO[bytes]) -> str:
    return (_text(errors).strip().splitlines() or [f"no answer within {_START_S:.0f} s"])[-1]


def _wrapper(isolation: Isolation) -> list[str]:
    """Return what stands before the interpreter, by absolute path. Raises SandboxError where it is not installed."""
    if isolation == "limits":
        return []
    name = "unshare" if isolation == "network" else "bwrap"
    if (found := shutil.which(name)) is None:
        raise SandboxError(f"{name} is not installed")
    program = os.path.abspath(found)  # PATH may name a folder relative to the working directory
    if isolation == "network":
        return [program, "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
    shown = dict.fromkeys(path for path in ("/usr", "/lib", "/lib64", "/bin", sys.base_prefix) if os.path.exists(path))
    return [
        *(program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *(word for path in shown for word in ("--ro-bind", path, path)),
        *(
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            *_tmpfs(program, "/dev/shm"),
            *_tmpfs(program, "/tmp"),
            "--chdir",
            "/tmp",
        ),
        *("--remount-ro", "/dev", "--remount-ro", "/"),  # they are in memory too, and have no bound
    ]


@cache
def _tmpfs(bwrap: str, folder: str) -> list[str]:
    """Return the arguments for a folder in memory, bounded where this version of bubblewrap can (0.7 on)."""
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=_START_S, check=False).stdout
    return [*(["--size", str(MAX_FILE)] if "--size" in known else []), "--tmpfs", folder]


def _limits(parent: int, group: MemoryGroup | None, *, timeout_s: float, memory_mib: int) -> Callable[[], None]:
    bounds = {
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: MAX_FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }

    def apply() -> None:
        if group is not None:
            group.enter()
        for kind, bound in bounds.items():
            resource.setrlimit(kind, (bound, bound))
        die_with(parent)

    return apply
