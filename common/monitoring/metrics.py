"""Numbers about the run: a capped Redis stream (one entry per trainer step), and heartbeats of every process.

Metric names are those that users of TRL, verl and torchforge already read (docs/algorithms.md lists them with formulas).
A heartbeat is a record with a time to live, stamped with Redis' clock: a process that stops beating is called silent after
SILENT_AFTER_S, and disappears from `sluice status` by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import redis

from sluice.common.errors import SerializationError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.serialization import decode_json

HEARTBEAT_S = 1.0
HEARTBEAT_TTL_S = 15
_NUMBERS = (
    "idle_fraction",
    "up_s",
    "waiting_s",
    "done",
    "running",
    "version",
    "tokens_per_s",
    "mismatch",
    "cache_mismatch",
)
SILENT_AFTER_S = 4.0
"""Three beats missed: dead, stopped or cut off."""


def write_metrics(client: redis.Redis, keys: Keys, metrics: Mapping[str, float], *, max_length: int) -> None:
    """Append one trainer step. Works while Redis is full, too."""
    fields = [text for name, value in metrics.items() for text in (name, f"{value:.15g}")]
    Scripts(client, keys)("write_record", "XADD", "metrics", "MAXLEN", "~", max_length, "*", *fields)


def read_metrics(
    client: redis.Redis, keys: Keys, *, after: str = "-", count: int | None = None
) -> list[tuple[str, dict[str, float]]]:
    """(entry id, metrics) of the steps after an entry id, oldest first."""
    start = after if after == "-" else f"({after}"
    entries = client.xrange(keys("metrics"), min=start, max="+", count=count)
    return [(entry.decode(), _floats(fields)) for entry, fields in entries]


def last_metrics(client: redis.Redis, keys: Keys) -> dict[str, float]:
    """The newest value of every metric of the last entries; empty before the first."""
    return {name: value for line in newest_metrics(client, keys, count=20) for name, value in line.items()}


def newest_metrics(client: redis.Redis, keys: Keys, *, count: int) -> list[dict[str, float]]:
    """The last entries, oldest first."""
    return [_floats(fields) for _, fields in reversed(client.xrevrange(keys("metrics"), count=count))]


def _floats(fields: Mapping[bytes, bytes]) -> dict[str, float]:
    return {name.decode(): float(value) for name, value in fields.items()}


def send_heartbeat(client: redis.Redis, keys: Keys, process: str, stats: Mapping[str, Any]) -> None:
    """Say that a process is alive, and what it is doing. Works while Redis is full, too."""
    Scripts(client, keys)("send_heartbeat", process, json.dumps(stats), HEARTBEAT_TTL_S)


def remove_heartbeat(client: redis.Redis, keys: Keys, process: str) -> None:
    """A process leaves in good order."""
    client.delete(keys("process", process))
    client.zrem(keys("processes"), process)


def read_heartbeats(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """Process -> facts, for those that beat within the time to live; `silent_s` is the age of the last beat."""
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.zrange(keys("processes"), 0, -1, withscores=True)
        (seconds, microseconds), beaten = pipe.execute()
    values = client.mget([keys("process", name.decode()) for name, _ in beaten]) if beaten else []
    now = seconds + microseconds / 1e6
    return {
        name.decode(): {**_stats(name.decode(), value), "silent_s": round(max(0.0, now - at_ms / 1000), 1)}
        for (name, at_ms), value in zip(beaten, values, strict=True)
        if value is not None
    }


def _stats(process: str, value: bytes) -> dict[str, Any]:
    """What a process says of itself; where that is no sound record, only that it is none: it must not harm who reads it."""
    try:
        stats = decode_json(value)
        wrong = [key for key in _NUMBERS if not isinstance(stats.get(key), int | float | None)]
        if wrong or not isinstance(stats["role"], str):
            raise SerializationError(f"{', '.join(wrong) or 'role'} has another type")
    except (SerializationError, AttributeError, KeyError, TypeError) as error:
        return {"role": process.partition("@")[0], "alarm": f"its heartbeat cannot be read: {error}"[:300]}
    return dict(stats)


def is_silent(stats: Mapping[str, Any]) -> bool:
    """Whether a process of `read_heartbeats` has missed several beats."""
    return bool(stats["silent_s"] > SILENT_AFTER_S)
