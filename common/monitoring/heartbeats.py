"""Heartbeats: the stats of every process once a second, from a thread of its own.

A heartbeat is a record with a time to live, stamped with Redis' clock: a process that sends none counts as silent after
SILENT_AFTER_S, and disappears from `sluice status` when the record expires.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections.client import connect
from sluice.common.errors import SerializationError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.serialization import decode_json

log = logging.getLogger("sluice.heartbeat")

HEARTBEAT_S = 1.0
HEARTBEAT_TTL_S = 15
_NUMBERS = (
    "idle_fraction", "up_s", "waiting_s", "done", "running", "version", "tokens_per_s", "mismatch", "cache_mismatch",
)  # fmt: skip
SILENT_AFTER_S = 4.0
"""Three heartbeats missed: dead, stopped or cut off."""


def connect_quickly(url: str | None = None) -> redis.Redis:
    """Return a connection that fails within seconds, for heartbeats and event loops, which must not hang in a command."""
    return connect(url, retry=Retry(NoBackoff(), 1), socket_timeout=3.0)


class HeartbeatThread:
    """Sends heartbeats until closed, whatever the process itself waits for."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        process: str,
        *,
        stats: Callable[[], Mapping[str, Any]],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
        on_error: Callable[[redis.RedisError], None] = lambda error: log.warning("no heartbeat: %s", error),
        period_s: float = HEARTBEAT_S,
    ) -> None:
        """Prepare the thread; `start` starts it.

        client: a connection of its own that fails quickly (`connect_quickly`). stats: of the process. before, after: called
        around each heartbeat. on_error: called with a Redis error of any of these; the next heartbeat follows regardless.
        """
        self._client, self._keys, self._process = client, keys, process
        self._stats, self._before, self._after, self._on_error = stats, before, after, on_error
        self._period_s = period_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the process from the list."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            self._client.delete(self._keys.process(self._process))
            self._client.zrem(self._keys.processes, self._process)
        except redis.RedisError as error:
            log.warning("could not remove the heartbeat: %s", error)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._before()
                send_heartbeat(self._client, self._keys, self._process, self._stats())
                self._after()
            except redis.RedisError as error:
                self._on_error(error)
            self._closed.wait(self._period_s)


def send_heartbeat(client: redis.Redis, keys: Keys, process: str, stats: Mapping[str, Any]) -> None:
    """Record that a process is alive, and its stats. Works while Redis is full, too."""
    Scripts(client, keys)("send_heartbeat", process, json.dumps(stats), HEARTBEAT_TTL_S)


def read_heartbeats(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """Return process -> stats of the heartbeats that have not expired; `silent_s` is the age of the last one."""
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.zrange(keys.processes, 0, -1, withscores=True)
        (seconds, microseconds), stamped = pipe.execute()
    values = client.mget([keys.process(name.decode()) for name, _ in stamped]) if stamped else []
    now = seconds + microseconds / 1e6
    return {
        name.decode(): {**_stats(name.decode(), value), "silent_s": round(max(0.0, now - at_ms / 1000), 1)}
        for (name, at_ms), value in zip(stamped, values, strict=True)
        if value is not None
    }


def _stats(process: str, value: bytes) -> dict[str, Any]:
    """Decode the stats of a process; of an invalid record return only an alarm, so that it does not harm its readers."""
    try:
        stats = decode_json(value)
        wrong = [key for key in _NUMBERS if not isinstance(stats.get(key), int | float | None)]
        if wrong or not isinstance(stats["role"], str):
            raise SerializationError(f"{', '.join(wrong) or 'role'} has another type")
    except (SerializationError, AttributeError, KeyError, TypeError) as error:
        return {"role": process.partition("@")[0], "alarm": f"its heartbeat cannot be read: {error}"[:300]}
    return dict(stats)


def is_silent(stats: Mapping[str, Any]) -> bool:
    """Return whether a process of `read_heartbeats` has missed several heartbeats."""
    return bool(stats["silent_s"] > SILENT_AFTER_S)
