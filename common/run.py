"""The run record: what a role needs besides Redis' address and the run's name.

`create_run` stores the resolved config and the model's assets under the run's prefix; `open_run` reads them. A run
name is taken once.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import redis

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import RUNS, Keys
from sluice.common.serialization import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """An existing run, opened."""

    name: str
    keys: Keys
    config: Config
    assets: dict[str, Any]
    "wire form of sluice.common.models.assets.ModelAssets"
    folder: str
    "absolute path of the run folder on the machine that created the run"


def create_run(
    client: redis.Redis, name: str, config: Config, *, assets: dict[str, Any], folder: str, may_exist: bool = False
) -> Run:
    """Store a new run. Raises ConfigError when the name is in use; `may_exist`: unless by the very same config."""
    keys = Keys(name)
    if not client.hsetnx(keys("run"), "created_at", time.time()):
        if may_exist and client.hget(keys("run"), "config") == config.to_yaml().encode():
            return open_run(client, name)
        if client.hget(keys("run"), "status") == b"deleting":
            raise ConfigError(f"run {name!r} is being deleted: choose another name, or wait (`sluice runs`)")
        raise ConfigError(
            f"run name {name!r} is in use on this Redis: choose another with --name, or continue it with --resume {name}"
        )
    record = {"config": config.to_yaml(), "assets": encode(assets), "folder": folder, "status": "created"}
    client.hset(keys("run"), mapping=record)
    client.hset(RUNS, name, time.time())
    return Run(name=name, keys=keys, config=config, assets=assets, folder=folder)


def open_run(client: redis.Redis, name: str) -> Run:
    """Read a run. Raises ConfigError when there is none of that name."""
    keys = Keys(name)
    config, assets, folder, status = client.hmget(keys("run"), ["config", "assets", "folder", "status"])
    if status == b"deleting":
        raise ConfigError(f"run {name!r} is being deleted; if that was cut off: `sluice runs delete {name}`")
    if config is None or assets is None or folder is None:
        known = ", ".join(sorted(run.decode() for run in client.hkeys(RUNS))) or "none"
        raise ConfigError(
            f"there is no run {name!r} on this Redis (runs: {known}). "
            f"Create it with `sluice create CONFIG --name {name}` or `sluice run CONFIG`"
        )
    return Run(
        name=name,
        keys=keys,
        config=parse_config(config.decode(), source=f"stored config of run {name}"),
        assets=decode(assets),
        folder=folder.decode(),
    )


def set_status(client: redis.Redis, keys: Keys, status: str) -> None:
    """created | running | finished | drained | stopped | failed | deleting."""
    client.hset(keys("run"), "status", status)


def process_name(role: str) -> str:
    """Name of this process in heartbeats and claims."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"
