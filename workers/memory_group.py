"""One bound on the memory of a program, all its processes and its files in memory together: a control group (cgroup).

Made where this user may make one: version 1 has `memory.limit_in_bytes` in a group below ours; version 2 `memory.max` in one
beside ours, because a group that holds processes hands no controller on. Linux only.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

log = logging.getLogger("sluice.reward")

_REMOVE_S = 5.0
"""Processes that were killed have gone after this long, or are stuck in the kernel."""
_PREFIX = "sluice-"


class MemoryGroup:
    """A control group with a bound."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Make it in the folder of another. Raises OSError."""
        self._path = folder / f"{_PREFIX}{os.getpid()}-{token_hex(4)}"
        self._path.mkdir()
        try:
            limits = [self._path / name for name in ("memory.max", "memory.limit_in_bytes")]
            next(filter(Path.exists, limits), limits[0]).write_text(str(limit_bytes))
            for name, swap_bytes in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", limit_bytes)):
                if (self._path / name).exists():
                    (self._path / name).write_text(str(swap_bytes))
        except OSError:
            self._path.rmdir()
            raise

    def enter(self) -> None:
        """Move this process into it: whatever it starts is in it as well. Raises OSError."""
        (self._path / "cgroup.procs").write_text("0")

    def end(self) -> None:
        """Kill what is in it, and remove it."""
        deadline = time.monotonic() + _REMOVE_S
        while time.monotonic() < deadline:
            for pid in (self._path / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self._path.rmdir()
                return
            except OSError:  # a killed process is in it until it has gone
                time.sleep(0.002)
        log.warning("the control group %s still holds a process that was killed", self._path)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup | None]:
    """Yield a group with this bound, and end it and all in it; None where none can be made."""
    if (folder := group_folder()) is None:
        yield None
        return
    group = MemoryGroup(folder, limit_bytes=limit_bytes)
    try:
        yield group
    finally:
        group.end()


@cache
def group_folder() -> Path | None:
    """Return the folder of the control group in which this process can make others; tried once."""
    for own in _own_groups():
        for folder in (own, own.parent):
            with suppress(OSError, subprocess.SubprocessError):
                group = MemoryGroup(folder, limit_bytes=64 << 20)
                try:
                    subprocess.run(["true"], preexec_fn=group.enter, check=True, timeout=20)
                finally:
                    group.end()
                _remove_abandoned(folder)
                return folder
    return None


def _own_groups() -> Iterator[Path]:
    """Yield the folders of our own groups that may bound memory: of version 2, and of version 1's controller."""
    with suppress(OSError):  # no Linux
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        groups = {kind: path for _, controllers, path in lines for kind in controllers.split(",")}
        for mount in Path("/proc/self/mountinfo").read_text().splitlines():  # proc(5)
            fields = mount.split()
            root, point, kind, options = fields[3], fields[4], fields[fields.index("-") + 1], fields[-1].split(",")
            controller = "" if kind == "cgroup2" else "memory" if kind == "cgroup" and "memory" in options else None
            if controller in groups:
                yield Path(point) / os.path.relpath(groups[controller], root)


def _remove_abandoned(folder: Path) -> None:
    """Remove groups whose process was killed."""
    for path in folder.glob(f"{_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            with suppress(OSError):
                path.rmdir()
