"""Capped Redis streams of a run: metrics, one entry per trainer step; samples; publications; events.

Metric names are those of TRL, verl and torchforge (docs/algorithms.md lists them with formulas).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import redis

from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.serialization import decode, encode

ArchivedStream = Literal["metrics", "samples", "controls", "events"]


def write_metrics(client: redis.Redis, keys: Keys, metrics: Mapping[str, float], *, max_length: int) -> None:
    """Append one trainer step. Works while Redis is full, too."""
    fields = [text for name, value in metrics.items() for text in (name, f"{value:.15g}")]
    Scripts(client, keys)("write_record", "XADD", keys.metrics, "MAXLEN", "~", max_length, "*", *fields)


def read_metrics(client: redis.Redis, keys: Keys, *, after: str = "0") -> list[tuple[str, dict[str, float]]]:
    """Return (entry id, metrics) of the steps after an entry id, oldest first."""
    return [(entry.decode(), _floats(fields)) for entry, fields in client.xrange(keys.metrics, min=f"({after}")]


def last_metrics(client: redis.Redis, keys: Keys) -> dict[str, float]:
    """Return the newest value of every metric of the last entries; empty before the first."""
    return {name: value for line in newest_metrics(client, keys, count=20) for name, value in line.items()}


def newest_metrics(client: redis.Redis, keys: Keys, *, count: int) -> list[dict[str, float]]:
    """Return the last entries, oldest first."""
    return [_floats(fields) for _, fields in reversed(client.xrevrange(keys.metrics, count=count))]


def last_entry(client: redis.Redis, keys: Keys, stream: ArchivedStream | Literal["publications"]) -> str:
    """Return the id of the newest entry, for `after` of read_metrics and wait_for_publication."""
    entries = client.xrevrange(getattr(keys, stream), count=1)
    return entries[0][0].decode() if entries else "0"


def write_samples(client: redis.Redis, keys: Keys, samples: Sequence[Mapping[str, Any]], *, kept: int) -> None:
    """Append trained groups for display and keep the newest `kept`. Works while Redis is full, too."""
    script = Scripts(client, keys)
    with client.pipeline(transaction=False) as pipe:
        for sample in samples:
            script("write_record", "XADD", keys.samples, "MAXLEN", kept, "*", "sample", encode(sample), client=pipe)
        pipe.execute()


def read_samples(client: redis.Redis, keys: Keys, *, after: str = "0") -> list[tuple[str, dict[str, Any]]]:
    """Return (entry id, sample) of the kept groups after an entry id, oldest first."""
    entries = client.xrange(keys.samples, min=f"({after}")
    return [(entry.decode(), decode(fields[b"sample"])) for entry, fields in entries]


def newest_samples(client: redis.Redis, keys: Keys, *, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Return the kept groups, newest first, decoded one by one."""
    return (decode(fields[b"sample"]) for _, fields in client.xrevrange(keys.samples, count=count))


def write_event(client: redis.Redis, keys: Keys, event: str, **fields: Any) -> None:
    """Append what happened to the run as a whole, at its newest published step. Works while Redis is full, too."""
    Scripts(client, keys)("write_event", event, *chain.from_iterable(fields.items()))


def read_events(client: redis.Redis, keys: Keys, *, after: str = "0") -> list[tuple[str, dict[str, str]]]:
    """Return (entry id, event) of the events after an entry id, oldest first; `at` is in seconds since the epoch."""
    entries = client.xrange(keys.events, min=f"({after}")
    return [(entry.decode(), _event(entry.decode(), fields)) for entry, fields in entries]


def _event(entry: str, fields: Mapping[bytes, bytes]) -> dict[str, str]:
    at_ms = int(entry.partition("-")[0])
    return {"at": f"{at_ms / 1000:.3f}", **{name.decode(): value.decode() for name, value in fields.items()}}


def wait_for_publication(client: redis.Redis, keys: Keys, *, after: str, timeout_s: float) -> str:
    """Block until a policy is published, at most `timeout_s`. Returns the newest entry id, or `after`."""
    reply = client.xread({keys.publications: after}, block=int(timeout_s * 1000), count=100)
    return reply[0][1][-1][0].decode() if reply else after


def read_archive(client: redis.Redis, keys: Keys, stream: ArchivedStream) -> Iterator[tuple[str, dict[bytes, bytes]]]:
    """Yield every entry of a stream, oldest first, a page per round trip."""
    start = "-"
    while page := client.xrange(getattr(keys, stream), min=start, count=1000):
        yield from ((entry.decode(), fields) for entry, fields in page)
        start = f"({page[-1][0].decode()}"


def _floats(fields: Mapping[bytes, bytes]) -> dict[str, float]:
    return {name.decode(): float(value) for name, value in fields.items()}
