"""Heartbeats: the stats of every process once a second, from a thread of its own.

A heartbeat is a record with a time to live, stamped with Redis' clock: a process that sends none counts as silent after
SILENT_AFTER_S, and disappears from `sluice status` when the record expires.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import redis
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
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
SILENT_AFTER_S = 4.0
"""Three heartbeats missed: dead, stopped or cut off."""


def connect_quickly(url: str | None = None) -> redis.Redis:
    """Return a connection that fails within seconds, for heartbeats and event loops, which must not hang in a command."""
    return connect(url, retry=Retry(NoBackoff(), 1), socket_timeout=3.0)


_Text = Annotated[str, Field(max_length=1000)]
_Number = Annotated[FiniteFloat, Field(ge=-1e15, le=1e15)]
_Count = Annotated[int, Field(ge=-1, le=10**15)]


class _Stats(BaseModel):
    """Types of the stats that others compute with or show; whatever a stage adds is its own."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: _Text
    alarm: _Text = ""
    host: _Text = ""
    device: _Text = ""
    digest: _Text = ""
    stopped_by: _Text = ""
    doing: _Text = ""
    pid: _Count = 0
    up_s: _Number = 0.0
    idle_fraction: _Number = 0.0
    waiting_s: _Number = 0.0
    tokens_per_s: _Number = 0.0
    step: _Count = 0
    version: _Count = 0
    running: _Count = 0
    done: _Count = 0
    evaluates: bool = False
    mismatch: _Number | None = None
    cache_mismatch: _Number | None = None
    adapter_share: Annotated[list[_Number], Field(min_length=2, max_length=2)] | None = None


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
            except Exception:  # without this thread a process that works counts as dead
                log.exception("no heartbeat")
            self._closed.wait(self._period_s)


def send_heartbeat(client: redis.Redis, keys: Keys, process: str, stats: Mapping[str, Any]) -> None:
    """Record that a process is alive, and its stats. Works while Redis is full, too."""
    Scripts(client, keys)("send_heartbeat", process, json.dumps(stats), HEARTBEAT_TTL_S)


def read_heartbeats(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """Return process -> stats of the heartbeats that have not expired; `silent_s` is the age of the last one.

    Of a record that cannot be read there is its role, by its name, and an alarm: `is_readable` is false.
    """
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.zrange(keys.processes, 0, -1, withscores=True)
        (seconds, microseconds), stamped = pipe.execute()
    names = [name.decode(errors="backslashreplace") for name, _ in stamped]
    values = client.mget([keys.process(name) for name in names]) if names else []
    now = seconds + microseconds / 1e6
    return {
        name: {**_stats(name, value), "silent_s": round(min(max(0.0, now - at_ms / 1000), 1e9), 1)}
        for name, at_ms, value in zip(names, (at_ms for _, at_ms in stamped), values, strict=True)
        if value is not None
    }


def _stats(process: str, value: bytes) -> dict[str, Any]:
    """Decode the stats of a process; of an invalid record return only an alarm, so that it does not harm its readers."""
    try:
        stats = decode_json(value)
        _Stats.model_validate(stats)
        return dict(stats)
    except SerializationError as error:
        reason = str(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return {
        "role": process.partition("@")[0],
        "alarm": f"its heartbeat cannot be read: {reason}"[:300],
        "unreadable": True,
    }


def is_readable(stats: Mapping[str, Any]) -> bool:
    """Return whether a record of `read_heartbeats` tells what its process does."""
    return "unreadable" not in stats


def is_silent(stats: Mapping[str, Any]) -> bool:
    """Return whether a process of `read_heartbeats` has missed several heartbeats."""
    return bool(stats["silent_s"] > SILENT_AFTER_S)
