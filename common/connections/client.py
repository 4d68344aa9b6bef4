"""Connections to Redis: one place for time-outs, retries and the message when it cannot be reached.

`SLUICE_REDIS_URL` names the data server, `SLUICE_BROKER_URL` the Celery broker where it is another one, `SLUICE_RUN` the run;
each URL may be in a file that `SLUICE_REDIS_URL_FILE` or `SLUICE_BROKER_URL_FILE` names (see secrets.py).
Both may be a `sentinel://` URL (see sentinel.py).

Every client that `connect` makes waits out an outage (see outage.py); the first connection does not, so that a wrong URL
fails at once. A connection that died silently costs one time-out: a reply that does not come within SOCKET_TIMEOUT_S is
requested again on a new connection.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.client import Pipeline
from redis.retry import Retry

from sluice.common.connections import sentinel
from sluice.common.connections.address import Address, parse_address
from sluice.common.connections.outage import OutageRetry, not_permitted
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError, ConnectionFailed

SOCKET_TIMEOUT_S = 5.0
BLOCK_S = 2.0
"""Longest blocking read: shorter than the socket time-out, or every idle wait would look like a dead server."""
_OLDEST_SERVER = (6, 2)
_CLUSTER = "is a Redis Cluster: a run needs one server, or one behind Sentinel"


def redis_url() -> str:
    """Return the data server's URL. Raises ConfigError when it is not set."""
    url = secret("SLUICE_REDIS_URL")
    if not url:
        raise ConfigError(
            "SLUICE_REDIS_URL is not set: name the Redis server, e.g. SLUICE_REDIS_URL=redis://127.0.0.1:6379/0"
        )
    return url


def broker_url() -> str:
    """Return the Celery broker's URL: the data server unless SLUICE_BROKER_URL names another."""
    return secret("SLUICE_BROKER_URL") or redis_url()


def run_name() -> str:
    """Return the name of the run that this process works for. Raises ConfigError when it is not set."""
    run = os.environ.get("SLUICE_RUN")
    if not run:
        raise ConfigError("SLUICE_RUN is not set: name the run this process works for (`sluice runs` lists them)")
    return run


def without_password(url: str) -> str:
    """Return the URL as it may be logged."""
    try:
        return parse_address(url).shown
    except ConfigError:
        return "the URL given"


class Client(redis.Redis):
    """A client whose pipelines survive a server that forgot its scripts (a restart, a fail-over) while they waited."""

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(Pipeline):
    def _execute_pipeline(self, *args: Any) -> list[Any]:
        return self._with_scripts(super()._execute_pipeline, *args)

    def _execute_transaction(self, *args: Any) -> list[Any]:
        return self._with_scripts(super()._execute_transaction, *args)

    def _with_scripts(self, execute: Callable[..., list[Any]], *args: Any) -> list[Any]:
        try:
            return execute(*args)
        except redis.exceptions.NoScriptError:
            self.load_scripts()
            return execute(*args)


def connect(url: str | None = None, **options: Any) -> redis.Redis:
    """Return a checked client. Replies are bytes, RESP2. Raises ConfigError, and ConnectionFailed when the server is
    unreachable, refuses the password, is too old, a replica, or a cluster.

    Its commands wait for a server that is unavailable or refuses writes, at most OUTAGE_S, unless `retry` says otherwise.
    """
    url = url or redis_url()
    settings: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "protocol": 2,
        "retry": OutageRetry(parse_address(url).shown),
    }
    if url.startswith("unix://"):
        del settings["socket_keepalive"], settings["socket_connect_timeout"]
    _check_server(url, settings)
    return _open(url, **{**settings, **options})


def _open(url: str, **options: Any) -> redis.Redis:
    if sentinel.is_sentinel(url):
        address = sentinel.parse(url)
        manager = address.manager(connection_class=sentinel.MasterConnection, **options)
        master: redis.Redis = manager.master_for(address.master, redis_class=Client)
        return master
    return Client.from_url(url, **options)


def outage(client: redis.Redis) -> str | None:
    """Return a sentence that says what a call of this client waits for now; None when none waits. Asks no server."""
    policy = client.get_retry()
    return policy.outage if isinstance(policy, OutageRetry) else None


def give_up_after(client: redis.Redis, seconds: float) -> None:
    """Bound the wait for an outage from now on: a process that is asked to stop must not hang on an unavailable server."""
    policy = client.get_retry()
    if isinstance(policy, OutageRetry):
        policy.limit_s = seconds


def persistence_warning(client: redis.Redis) -> str | None:
    """Return one sentence when a crash of the server would lose the run; None when it keeps an append-only file."""
    if client.info("persistence").get("aof_enabled"):
        return None
    return (
        "Redis keeps no append-only file: if the server dies, every group in flight and the run itself are lost "
        "(set `appendonly yes` on the server)"
    )


def check_broker() -> None:
    """Check the server of Celery's messages, where it is another one. Raises ConfigError, ConnectionFailed."""
    if url := secret("SLUICE_BROKER_URL"):
        connect(url).close()


def eviction_problem(client: redis.Redis) -> str | None:
    """Return one sentence where the server drops keys when it is full; None where it refuses writes, as a run needs."""
    info = client.info("memory")
    maxmemory, policy = int(info.get("maxmemory", 0)), info.get("maxmemory_policy", "noeviction")
    if not maxmemory or policy == "noeviction":
        return None
    return (
        f"Redis evicts keys when it reaches maxmemory ({maxmemory / 2**20:.0f} MiB, policy {policy}): groups would be lost "
        "without a trace. Set maxmemory-policy noeviction"
    )


def refuse_eviction(client: redis.Redis) -> None:
    """Raise ConfigError where the server drops keys when it is full: for what begins a run or trains."""
    if problem := eviction_problem(client):
        raise ConfigError(problem)


def _check_server(url: str, settings: dict[str, Any]) -> None:
    address = parse_address(url)
    if sentinel.is_sentinel(url):
        sentinel.parse(url).master_address()
    probe = _open(url, **{**settings, "retry": Retry(ExponentialBackoff(), 1)})
    try:
        info = probe.info()
    except redis.AuthenticationError:
        raise ConnectionFailed(
            f"Redis at {address.shown} refused the password: check the URL's user and password"
        ) from None
    except redis.ResponseError as error:
        raise ConnectionFailed(f"Redis at {address.shown} {_refusal(error, address)}") from None
    except redis.InvalidResponse as error:
        raise ConnectionFailed(
            f"what answers at {address.shown} is not Redis ({error}); set SLUICE_REDIS_URL to the server to use"
        ) from None
    except (redis.RedisError, OSError) as error:
        tls = ", or to redis:// where the server has no TLS" if address.scheme == "rediss" else ""
        raise ConnectionFailed(
            f"cannot reach Redis at {address.shown} ({str(error).rstrip('.')}). "
            f"Start it, or set SLUICE_REDIS_URL to the server to use{tls}"
        ) from None
    finally:
        probe.close()
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_SERVER:
        raise ConnectionFailed(f"Redis at {address.shown} is version {version}; Sluice needs 6.2 or newer")
    if info.get("redis_mode") == "cluster":
        raise ConnectionFailed(f"Redis at {address.shown} {_CLUSTER}")
    if info.get("role") == "slave" and not sentinel.is_sentinel(url):  # the sentinels say when there is a master again
        master = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        raise ConnectionFailed(
            f"Redis at {address.shown} is a replica, which takes no writes: name its master, {master}, or their Sentinel"
        )


def _refusal(error: redis.ResponseError, address: Address) -> str:
    """Return what a server that answers refuses, as a predicate."""
    if words := not_permitted(error):
        return words
    if "cluster" in str(error):
        return _CLUSTER
    if "DB index" in str(error):
        return f"has no database {address.database}: it is the number at the end of the URL; most servers have 0 to 15"
    return f"refuses every command: {error}"
