"""The keys of runs in Redis: their memory, and their removal.

status `deleting` (the name stays in use) -> every other key of the run, in batches -> its entry among the runs -> its
record, last. Interrupted anywhere, it can be done again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import redis

from sluice.common.keys import ALL_RUNS, RUNS, Keys
from sluice.common.ledger.scripts import Scripts

_PAGE = 1000
"Keys per round trip."


def has_keys(client: redis.Redis, keys: Keys) -> bool:
    """Return whether a run has any key."""
    return next(run_keys(client, keys), None) is not None


def run_keys(client: redis.Redis, keys: Keys) -> Iterator[bytes]:
    """Yield all keys of a run; pattern characters in its name are escaped."""
    pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", keys.root) + "*"
    yield from client.scan_iter(match=pattern, count=_PAGE)


def memory_of_runs(client: redis.Redis) -> Counter[str]:
    """Return run -> bytes of Redis memory that its keys hold, on this server."""
    held: Counter[str] = Counter()
    for batch in _pages(client.scan_iter(match=ALL_RUNS, count=_PAGE)):
        with client.pipeline(transaction=False) as pipe:
            for key in batch:
                pipe.memory_usage(key)
            for key, size in zip(batch, pipe.execute(), strict=True):
                held[key.decode().partition("{")[2].partition("}:")[0]] += size or 0
    return held


def begin_removal(client: redis.Redis, keys: Keys) -> None:
    """Mark a run as being deleted: no process opens it from now on. Works while Redis is full, too."""
    Scripts(client, keys)("write_record", "HSET", keys.run_record, "status", "deleting")


def remove_keys(client: redis.Redis, keys: Keys) -> int:
    """Remove all keys of a run but its record, in batches. Returns how many."""
    doomed = (key for key in run_keys(client, keys) if key.decode() != keys.run_record)
    return sum(int(client.unlink(*batch)) for batch in _pages(doomed))


def end_removal(client: redis.Redis, keys: Keys) -> int:
    """Free the name. Returns how many keys were removed."""
    client.hdel(RUNS, keys.run)  # before the record: a run created after that has an entry of its own
    return int(client.unlink(keys.run_record))


def _pages(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    left = iter(keys)
    while page := list(islice(left, _PAGE)):
        yield page
