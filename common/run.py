"""The run record: what a role needs besides Redis' address and the run's name.

`create_run` stores the resolved config and the model's assets under the run's prefix; `open_run` reads them. A run
name is used once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
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


class _Text:
    """A field of the record as text; "" where it is not set."""

    def __set_name__(self, owner: type[RunRecord], name: str) -> None:
        self._name = name

    def __get__(self, record: RunRecord, owner: type[RunRecord]) -> str:
        return (record._client.hget(record._key, self._name) or b"").decode()


class RunRecord:
    """The hash of a run in Redis. Only this class and the scripts of the ledger read and write it."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._key = client, keys.run_record

    status = _Text()
    """created | running | finished | drained | stopped | failed | deleting; "" where there is no such run."""
    created_at = _Text()
    """Seconds since the epoch, as text that never changes; "" where there is no such run."""
    config = _Text()
    """The resolved config as YAML; "" where there is no such run."""
    folder = _Text()
    """Absolute path of the run folder on the machine that created the run; "" where there is no such run."""
    dashboard = _Text()
    """Address of the web page that `sluice run` serves; "" while there is none."""

    failure = _Text()
    """Why a run has failed, in a sentence; "" for any other status."""

    def set_status(self, status: str, *, failure: str = "") -> None:
        self._client.hset(self._key, mapping={"status": status, "failure": failure})

    @property
    def incarnation(self) -> int:
        """Number of trainer processes that the run has had; the newest one owns it."""
        return int(self._client.hget(self._key, "incarnation") or 0)

    def begin_incarnation(self) -> int:
        """Return the incarnation of a trainer process that owns the run from now on."""
        return int(self._client.hincrby(self._key, "incarnation", 1))

    def restore_incarnation(self, incarnation: int) -> None:
        """Set the incarnation in a Redis that has lost it."""
        if self.incarnation < incarnation:
            self._client.hset(self._key, "incarnation", incarnation)

    def set_dashboard(self, address: str) -> None:
        if address:
            self._client.hset(self._key, "dashboard", address)
        else:
            self._client.hdel(self._key, "dashboard")

    def held(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Return (paused, draining), each {who, at: seconds since the epoch} of the operator who ordered it, or None."""
        paused, draining = self._client.hmget(self._key, ["paused", "draining"])
        return _order(paused), _order(draining)

    def create(self, config: str, assets: bytes, folder: str) -> bool:
        """Write the record. Returns False, and writes nothing, where the name is in use."""
        if not self._client.hsetnx(self._key, "created_at", time.time()):
            return False
        record = {"config": config, "assets": assets, "folder": folder, "status": "created"}
        self._client.hset(self._key, mapping=record)
        return True

    def read_assets(self) -> bytes | None:
        found: bytes | None = self._client.hget(self._key, "assets")
        return found


def _order(raw: bytes | None) -> dict[str, Any] | None:
    """Return an operator's order. What cannot be read is one all the same: the scripts of the ledger obey any text."""
    if not raw:
        return None
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        order = json.loads(raw)
        return {"who": str(order["who"]), "at": float(order["at"])}
    return {"who": "unreadable", "at": 0.0}


def list_runs(client: redis.Redis) -> dict[str, float]:
    """Return every run of this Redis -> seconds of its creation, by name."""
    return {name.decode(): float(created) for name, created in sorted(client.hgetall(RUNS).items())}


def create_run(
    client: redis.Redis, name: str, config: Config, *, assets: dict[str, Any], folder: str, may_exist: bool = False
) -> Run:
    """Store a new run. Raises ConfigError when the name is in use; `may_exist`: unless by the very same config."""
    keys = Keys(name)
    record = RunRecord(client, keys)
    if not record.create(config.to_yaml(), encode(assets), folder):
        if may_exist and record.config == config.to_yaml():
            return open_run(client, name)
        if record.status == "deleting":
            raise ConfigError(f"run {name!r} is being deleted: choose another name, or wait (`sluice runs`)")
        raise ConfigError(
            f"run name {name!r} is in use on this Redis: choose another with --name, or continue it with --resume {name}"
        )
    client.hset(RUNS, name, time.time())
    return Run(name=name, keys=keys, config=config, assets=assets, folder=folder)


def open_run(client: redis.Redis, name: str) -> Run:
    """Read a run. Raises ConfigError when there is none of that name."""
    keys = Keys(name)
    record = RunRecord(client, keys)
    if record.status == "deleting":
        raise ConfigError(f"run {name!r} is being deleted; if that was cut off: `sluice runs delete {name}`")
    config, assets, folder = record.config, record.read_assets(), record.folder
    if not config or assets is None or not folder:
        known = ", ".join(list_runs(client)) or "none"
        raise ConfigError(
            f"there is no run {name!r} on this Redis (runs: {known}). "
            f"Create it with `sluice create CONFIG --name {name}` or `sluice run CONFIG`"
        )
    return Run(
        name=name,
        keys=keys,
        config=parse_config(config, source=f"stored config of run {name}"),
        assets=decode(assets),
        folder=folder,
    )


def process_name(role: str) -> str:
    """Return the name of this process in heartbeats and claims."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"
