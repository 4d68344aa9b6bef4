"""A full disk as an error that a caller can wait out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
