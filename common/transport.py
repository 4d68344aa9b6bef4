"""Kombu's Redis transport with one client object per channel.

kombu 5.7 makes a new `redis.Redis` for every command it sends, two per consumed message and one per published one; the
constructor alone was a quarter to a third of a consumer's main thread. This keeps one over the same connection pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    """A channel that keeps its client until its connection pool is replaced."""

    _kept: Any = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        if client is None:
            if self._kept is None or self._kept.connection_pool is not self.pool:
                self._kept = self._create_client()
            client = self._kept
        yield client


class Transport(redis.Transport):
    """The transport that `broker_transport` names."""

    Channel = Channel
