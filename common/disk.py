"""A full disk as an error that a caller can wait out, files that are replaced as a whole, and files that stay bounded for as
long as a run lives.

Over its size a bounded file becomes `NAME.1`, that one `NAME.2`, and so on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sluice.common.errors import DiskFull


@contextmanager
def needing_room(folder: Path, *, what: str) -> Iterator[None]:
    """Raise DiskFull where `folder` has no room for what is written inside; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        # safetensors reports the operating system's error as text only
        code = getattr(error, "errno", None)
        if code not in (errno.ENOSPC, errno.EDQUOT) and f"os error {errno.ENOSPC}" not in str(error):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise DiskFull(f"the disk is full: no room for {what} in {folder} ({free:.1f} MiB free)") from error


def replace_text(path: Path, text: str) -> None:
    """Replace a small file durably, completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotated(path: Path) -> list[Path]:
    """Return a file and its older parts, oldest first, as far as they exist."""
    older = sorted(path.parent.glob(f"{path.name}.[0-9]*"), key=lambda part: -int(part.suffix[1:]))
    return [*older, *([path] if path.exists() else [])]


def read_tail(path: Path, max_bytes: int | None = None) -> bytes:
    """Return a file, or at most its last bytes from the beginning of a line; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = 0 if max_bytes is None else max(0, size - max_bytes)
            file.seek(begin)
            text = file.read(size - begin)
    except OSError:
        return b""
    return text.partition(b"\n")[2] if begin else text


def read_json_lines(path: Path, *, max_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a bounded file and its older parts, oldest first; of max_bytes the newest. Torn lines are left out."""
    parts, left = rotated(path), max_bytes
    if left is not None:
        while len(parts) > 1 and sum(part.stat().st_size for part in parts[1:]) >= left:
            del parts[0]
        left -= sum(part.stat().st_size for part in parts[1:])
    for number, part in enumerate(parts):
        for line in read_tail(part, left if number == 0 else None).splitlines():
            with suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def rotate(path: Path, *, max_bytes: int, kept: int) -> None:
    """Rotate a file that its writers open anew for every line. kept: older parts. Raises OSError."""
    if not path.exists() or path.stat().st_size <= max_bytes:
        return
    for number in range(kept - 1, 0, -1):
        if (part := _part(path, number)).exists():
            part.rename(_part(path, number + 1))
    path.rename(_part(path, 1))


def cut(path: Path, *, max_bytes: int) -> None:
    """Rotate a file that other processes hold open for appending: its content moves to `NAME.1`, and it begins anew.

    What is written between copying and cutting is lost. Raises OSError; without room for the copy the file is cut all the same.
    """
    if path.stat().st_size <= max_bytes:
        return
    try:
        shutil.copyfile(path, _part(path, 1))
    finally:
        os.truncate(path, 0)


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
