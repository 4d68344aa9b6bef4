"""Running an untrusted Python program: in a process of its own, with the isolation that this machine offers.

    files      bubblewrap (`bwrap`): sees the interpreter, an empty /tmp and nothing else; also all of `network`
    network    util-linux' `unshare`: no network, its own process ids, which all end with it; sees this user's files
    limits     where neither works: time, memory, file size only

Always: an empty environment, CPU seconds, address space, file size and open files bounded, output cut, one wall-clock limit
after which all that it started is killed; it ends with this process. What is not the program's fault raises SandboxError.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sluice.common.errors import RewardError
from sluice.common.parent import die_with

Isolation = Literal["limits", "network", "files"]
LEVELS: tuple[Isolation, ...] = ("limits", "network", "files")
MAX_OUTPUT = 64 * 1024
"Bytes of output that are read."
MAX_PROCESSES = 32
_PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-"]


class SandboxError(RewardError):
    """The sandbox itself failed: an infrastructure failure, never a score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a program."""

    output: str
    "standard output and errors, the first MAX_OUTPUT bytes"
    timed_out: bool


@cache
def available() -> Isolation:
    """Return the strictest level that works here; tried once."""
    for level in reversed(LEVELS):
        wrapper = _wrapper(level)
        if not wrapper:
            return level
        if shutil.which(wrapper[0]):
            done = subprocess.run([*wrapper, *_PYTHON], input=b"", capture_output=True, timeout=20, check=False)
            if done.returncode == 0:
                return level
    raise AssertionError("limits need no wrapper")


def run_python(program: str, *, stdin: str = "", timeout_s: float, memory_mib: int, isolation: Isolation) -> Outcome:
    """Run a program to its end or its limit. Raises SandboxError where it could not be started.

    It reads `stdin`; `program` itself is not in any file or command line that it could read.
    """
    source = f"import io, sys\nsys.stdin = io.StringIO({stdin!r})\n{program}"
    if isolation != "limits":
        # processes are counted per user namespace, so this bounds the program alone; the machine's root is exempt
        source = f"import resource\nresource.setrlimit(resource.RLIMIT_NPROC, ({MAX_PROCESSES},) * 2)\n{source}"
    with tempfile.TemporaryDirectory(prefix="sluice-sandbox-") as folder, tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [*_wrapper(isolation), *_PYTHON],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
                preexec_fn=_limits(os.getpid(), timeout_s=timeout_s, memory_mib=memory_mib),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SandboxError(f"the sandbox could not be started: {error}") from None
        timed_out = False
        try:
            process.communicate(source.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        output.seek(0)
        text = output.read(MAX_OUTPUT).decode(errors="replace")
    if process.returncode and text.startswith(("bwrap: ", "unshare: ")):
        raise SandboxError(f"the sandbox could not be started: {text.splitlines()[0]}")
    return Outcome(output=text, timed_out=timed_out)


def _wrapper(isolation: Isolation) -> list[str]:
    if isolation == "limits":
        return []
    if isolation == "network":
        return ["unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
    shown = dict.fromkeys(path for path in ("/usr", "/lib", "/lib64", "/bin", sys.base_prefix) if os.path.exists(path))
    binds = [word for path in shown for word in ("--ro-bind", path, path)]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *binds,
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),
    ]


def _limits(parent: int, *, timeout_s: float, memory_mib: int) -> Callable[[], None]:
    bounds = {
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mib * 1024 * 1024,
        resource.RLIMIT_FSIZE: 16 * 1024 * 1024,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }

    def apply() -> None:
        for kind, bound in bounds.items():
            resource.setrlimit(kind, (bound, bound))
        die_with(parent)

    return apply
