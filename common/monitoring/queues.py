"""Celery's queues, read without consuming: how many messages wait, and how long the oldest has waited.

A queue is a Redis list: messages are pushed at its head and popped from its tail, so the oldest is the last element. Its header
`sent_at` (`broker.send`) says when it was sent, in seconds of the sender's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import redis

from sluice.common.connections.secrets import secret
from sluice.common.monitoring.heartbeats import connect_quickly
from sluice.common.run import Run
from sluice.common.serialization import decode_json


@dataclass(frozen=True, slots=True)
class Queue:
    """The messages that wait in one queue."""

    depth: int
    oldest_age_s: float
    "0 when it is empty, or its oldest element is not a message of ours"


def broker_client(client: redis.Redis) -> redis.Redis:
    """Return a client of the server that holds Celery's queues: SLUICE_BROKER_URL's, else `client`, the data server's."""
    url = secret("SLUICE_BROKER_URL")
    return _connect_once(url) if url else client


_connect_once = cache(connect_quickly)


def read_queues(client: redis.Redis, run: Run, queues: tuple[str, ...]) -> dict[str, Queue]:
    """Read depth and oldest age of each, in one round trip to the broker."""
    with broker_client(client).pipeline(transaction=False) as pipe:
        pipe.time()
        for queue in queues:
            pipe.llen(run.keys.queue(queue))
            pipe.lindex(run.keys.queue(queue), -1)
        (seconds, microseconds), *rest = pipe.execute()
    now = seconds + microseconds / 1e6
    found = zip(queues, rest[0::2], rest[1::2], strict=True)
    return {queue: Queue(depth, _age_s(oldest, now=now)) for queue, depth, oldest in found}


def _age_s(message: bytes | None, *, now: float) -> float:
    if message is None:
        return 0.0
    try:
        return round(max(0.0, now - float(decode_json(message)["headers"]["sent_at"])), 3)
    except (ValueError, LookupError, TypeError):  # a foreign element: the transport sets it aside when it gets there
        return 0.0
