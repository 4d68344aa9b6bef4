"""Training pauses while a disk is full: a write is retried until there is room."""

from __future__ import annotations

import time
from collections.abc import Callable

from sluice.common.errors import DiskFull
from sluice.trainer.heartbeat import TrainerHeartbeat

DISK_RETRY_S = 3.0
"""While a disk is full, how often the trainer tries again."""


def retry_while_disk_full(
    heartbeat: TrainerHeartbeat, is_stopping: Callable[[], bool], write: Callable[[], None]
) -> None:
    """Write a file, with an alarm while there is no room. Raises DiskFull when told to stop meanwhile."""
    while True:
        try:
            write()
        except DiskFull as error:
            heartbeat.raise_alarm(f"training pauses: {error}")
            if is_stopping():
                raise
            time.sleep(DISK_RETRY_S)
        else:
            heartbeat.clear_alarm()
            return
