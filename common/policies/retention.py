"""Which versions are kept: the newest, the base model, what an evaluation or a reader needs, and the bases of all of these.

A process that fetches a version is listed in `readers` meanwhile, and versions with readers are not collected. Tensors of a
trainer that was killed before it wrote their manifest are freed at the first publication of the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from secrets import token_hex

import redis

from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies.lineage import read_versions
from sluice.common.policies.manifest import ManifestChain
from sluice.common.policies.transports import Transport
from sluice.common.run import process_name

READER_S = 120.0
"""A reader that does not renew its entry for this long counts as dead."""


class Retention:
    """Keeps the versions of one run that are needed, and frees the others."""

    def __init__(
        self, client: redis.Redis, keys: Keys, *, chain: ManifestChain, transport: Transport, keep: int
    ) -> None:
        """Prepare. keep: how many of the newest versions are kept."""
        self._client, self._keys, self._keep = client, keys, keep
        self._chain, self._transport = chain, transport
        self._scripts = Scripts(client, keys)
        self._has_swept = False

    @contextmanager
    def reading(self, version: int) -> Iterator[Callable[[], None]]:
        """List this process as a reader of a version; calling what this yields renews the entry."""
        entry = f"{version}|{process_name('reader')}/{token_hex(3)}"
        renewed_at = -math.inf

        def renew() -> None:
            nonlocal renewed_at
            if time.monotonic() - renewed_at > READER_S / 4:
                self._scripts("reader", entry, round(READER_S * 1000))
                renewed_at = time.monotonic()

        renew()
        try:
            yield renew
        finally:
            self._scripts("reader", entry, 0)

    def _read_versions(self) -> set[int]:
        """Return the versions that a process is fetching."""
        seconds, microseconds = self._client.time()
        now_ms = seconds * 1000 + microseconds // 1000
        self._client.zremrangebyscore(self._keys.readers, "-inf", now_ms)
        entries = self._client.zrange(self._keys.readers, 0, -1)
        return read_versions((entry.partition(b"|")[0] for entry in entries), where=self._keys.readers)

    def sweep(self, *, before: int) -> None:
        """Free what no manifest names, once per process, before its first write.

        Not from `before` on: a trainer that has replaced this one may be writing those versions.
        """
        if not self._has_swept:
            needed = {*self._chain.versions(), *self._read_versions()}
            self._transport.sweep(lambda version: version < before and version not in needed)
            self._has_swept = True

    def collect_garbage(self) -> None:
        """Free the tensors, then the manifest, of every version that is not needed."""
        stored = self._chain.versions()
        evaluated = read_versions(self._client.hvals(self._keys.evaluations), where=self._keys.evaluations)
        needed = {0} | evaluated | self._read_versions()
        needed |= {*stored[-self._keep :]}
        needed |= {base for version in needed.intersection(stored) for base in self._chain.base_chain(version)}
        for version in stored:
            if version not in needed:
                self._transport.delete(version)
                self._chain.remove(version)
