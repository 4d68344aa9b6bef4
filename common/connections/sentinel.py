"""Redis behind Sentinel, named by one URL that lists the sentinels, the master's name and the database:

    sentinel://[user][:password]@host1:26379,host2:26379/mymaster/0?sentinel_password=...

User and password are those of the Redis servers; `sentinel_password` is for sentinels that ask for one. The port defaults to
26379, the database to 0. A connection asks the sentinels for the master each time it is opened, so that a fail-over is one
reconnection. Replication is asynchronous: a fail-over may lose the writes of the last moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from sluice.common.connections.address import parse_address
from sluice.common.errors import ConnectionFailed

SCHEME = "sentinel"
_ANSWER_S = 2.0
"""A sentinel that does not answer for this long is skipped for the next."""


class MasterConnection(SentinelManagedConnection):
    """A connection that asks for the master each time it connects.

    redis-py's asks only when a connection leaves the pool: a command that is repeated through a fail-over would keep
    connecting to the old address.
    """

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if not self._sock:
            self.host, self.port = self.connection_pool.get_master_address()
        super().connect_check_health(check_health=check_health, retry_socket_connect=False)

    def _connect_retry(self) -> None:
        if not self._sock:
            self.connect_check_health(check_health=self.connection_pool.check_connection)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentinelAddress:
    """A parsed sentinel URL."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    database: int
    username: str | None
    password: str | None
    sentinel_password: str | None

    @property
    def server(self) -> str:
        """Its name in messages: without passwords."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.sentinels)
        return f"{SCHEME}://{hosts}/{self.master}/{self.database}"

    def manager(self, **options: Any) -> Sentinel:
        """Return redis-py's view of the sentinels; `options` are those of connections to the master."""
        return Sentinel(
            self.sentinels,
            sentinel_kwargs={
                "socket_timeout": _ANSWER_S,
                "socket_connect_timeout": _ANSWER_S,
                "password": self.sentinel_password,
                "retry": Retry(NoBackoff(), 0),
            },
            **{**options, "db": self.database, "username": self.username, "password": self.password},
        )

    def master_address(self) -> tuple[str, int]:
        """Return where the master is now. Raises ConnectionFailed that says what is wrong."""
        silent: list[str] = []
        known: set[str] = set()
        with self.manager() as manager:
            for (host, port), sentinel in zip(self.sentinels, list(manager.sentinels), strict=True):
                try:
                    known |= set(sentinel.sentinel_masters())
                except redis.RedisError as error:
                    silent.append(f"{host}:{port}: {str(error).rstrip('.')}")
            if len(silent) == len(self.sentinels):
                raise ConnectionFailed(f"no Sentinel of {self.server} can be asked ({'; '.join(silent)})")
            if self.master not in known:
                names = ", ".join(sorted(known)) or "none"
                raise ConnectionFailed(
                    f"the Sentinels of {self.server} know no master {self.master!r}; they know: {names}"
                )
            try:
                host, port = manager.discover_master(self.master)
            except redis.ConnectionError:
                raise ConnectionFailed(
                    f"the Sentinels of {self.server} say that {self.master!r} is down; a fail-over may be under way"
                ) from None
        return str(host), int(port)


def parse(url: str) -> SentinelAddress:
    """Parse a sentinel URL. Raises ConfigError when it is not of the form above."""
    address = parse_address(url)
    return SentinelAddress(
        sentinels=address.hosts,
        master=address.name,
        database=address.database,
        username=address.username,
        password=address.password,
        sentinel_password=address.options.get("sentinel_password"),
    )


def is_sentinel(url: str) -> bool:
    return url.startswith(f"{SCHEME}://")
