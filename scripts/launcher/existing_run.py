"""Opening an existing run for a command that reads or controls it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from sluice.common.connections.client import connect, give_up_after
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError
from sluice.common.run import Run, list_runs, open_run
from sluice.scripts.launcher.redis_server import reading_server
from sluice.scripts.launcher.run_folder import existing_folder

READER_WAIT_S = 5.0
"""How long a command that only reads waits for a Redis that becomes unavailable meanwhile."""


@contextmanager
def opened_run(name: str | None) -> Iterator[tuple[redis.Redis, Run, str]]:
    """Open an existing run and its Redis' URL: SLUICE_REDIS_URL's, or the newest (or named) run folder's own Redis.

    A run may be named by its folder, as `export` and `replay` do.
    """
    name = name and Path(name).name
    if url := secret("SLUICE_REDIS_URL"):
        client = connect(url)
        give_up_after(client, READER_WAIT_S)
        yield client, open_run(client, name or os.environ.get("SLUICE_RUN") or _newest_name(client)), url
        return
    folder = existing_folder(name or os.environ.get("SLUICE_RUN"))
    with reading_server(folder / "redis") as url:
        client = connect(url)
        give_up_after(client, READER_WAIT_S)
        yield client, open_run(client, folder.name), url
        client.close()


def _newest_name(client: redis.Redis) -> str:
    runs = list_runs(client)
    if not runs:
        raise ConfigError("there is no run on this Redis yet: `sluice run CONFIG` makes one")
    return max(runs, key=lambda name: runs[name])
