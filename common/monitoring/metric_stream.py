"""Numbers about the run: a capped Redis stream, one entry per trainer step.

Metric names are those that users of TRL, verl and torchforge already read (docs/algorithms.md lists them with formulas).
"""

from __future__ import annotations

from collections.abc import Mapping

import redis

from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts


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
