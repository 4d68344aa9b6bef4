"""Numbers about the run: a capped Redis stream (one entry per trainer step), and heartbeats of every process.

Metric names are those that users of TRL, verl and torchforge already read (docs/algorithms.md lists them with formulas).
A heartbeat is a hash with a time to live: a process that stops beating disappears from `sluice status` by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import redis

from common.keys import Keys

HEARTBEAT_S = 3.0
HEARTBEAT_TTL_S = 15


def write_metrics(client: redis.Redis, keys: Keys, metrics: Mapping[str, float], *, max_length: int) -> None:
    """Append one trainer step."""
    fields: Any = {name: f"{value:.15g}" for name, value in metrics.items()}
    client.xadd(keys("metrics"), fields, maxlen=max_length, approximate=True)


def read_metrics(
    client: redis.Redis, keys: Keys, *, after: str = "-", count: int | None = None
) -> list[tuple[str, dict[str, float]]]:
    """(entry id, metrics) of the steps after an entry id, oldest first."""
    start = after if after == "-" else f"({after}"
    entries = client.xrange(keys("metrics"), min=start, max="+", count=count)
    return [(entry.decode(), _floats(fields)) for entry, fields in entries]


def last_metrics(client: redis.Redis, keys: Keys) -> dict[str, float]:
    """The newest value of every metric of the last entries; empty before the first."""
    entries = client.xrevrange(keys("metrics"), count=5)
    return {name: value for _, fields in reversed(entries) for name, value in _floats(fields).items()}


def _floats(fields: Mapping[bytes, bytes]) -> dict[str, float]:
    return {name.decode(): float(value) for name, value in fields.items()}


def beat(client: redis.Redis, keys: Keys, process: str, facts: Mapping[str, Any]) -> None:
    """Say that a process is alive, and what it is doing."""
    with client.pipeline(transaction=False) as pipe:
        pipe.zadd(keys("processes"), {process: time.time()})
        pipe.set(keys("process", process), json.dumps(facts), ex=HEARTBEAT_TTL_S)
        pipe.execute()


def silence(client: redis.Redis, keys: Keys, process: str) -> None:
    """A process leaves in good order."""
    client.delete(keys("process", process))
    client.zrem(keys("processes"), process)


def read_heartbeats(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """Process -> facts, for those that beat within the time to live."""
    names = [name.decode() for name in client.zrange(keys("processes"), 0, -1)]
    values = client.mget([keys("process", name) for name in names]) if names else []
    gone = [name for name, value in zip(names, values, strict=True) if value is None]
    if gone:
        client.zremrangebyscore(keys("processes"), "-inf", time.time() - 10 * HEARTBEAT_TTL_S)
    return {name: json.loads(value) for name, value in zip(names, values, strict=True) if value is not None}
