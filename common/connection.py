"""Connections to Redis: one place for time-outs, retries and the message when it cannot be reached.

`SLUICE_REDIS_URL` names the data server, `SLUICE_BROKER_URL` the Celery broker where it is another one, `SLUICE_RUN` the run.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from common.errors import ConfigError, ConnectionFailed

SOCKET_TIMEOUT_S = 15.0
BLOCK_S = 5.0
"""Longest blocking read: shorter than the socket time-out, or every idle wait would look like a dead server."""
_OLDEST_SERVER = (6, 2)


def redis_url() -> str:
    """The data server's URL. Raises ConfigError when it is not named."""
    url = os.environ.get("SLUICE_REDIS_URL")
    if not url:
        raise ConfigError(
            "SLUICE_REDIS_URL is not set: name the Redis server, e.g. SLUICE_REDIS_URL=redis://127.0.0.1:6379/0"
        )
    return url


def broker_url() -> str:
    """The Celery broker's URL: the data server unless SLUICE_BROKER_URL names another."""
    return os.environ.get("SLUICE_BROKER_URL") or redis_url()


def run_name() -> str:
    """The run this process works for. Raises ConfigError when it is not named."""
    run = os.environ.get("SLUICE_RUN")
    if not run:
        raise ConfigError("SLUICE_RUN is not set: name the run this process works for (`sluice runs` lists them)")
    return run


def without_password(url: str) -> str:
    """The URL as it may be logged."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def connect(url: str | None = None, **options: Any) -> redis.Redis:
    """A checked client. Replies are bytes, RESP2. Raises ConnectionFailed when the server is unreachable or too old.

    redis-py 8 retries every command 10 times by default, writes included; all our writes are idempotent, so retrying is
    safe, and a server restart of a few seconds passes unnoticed.
    """
    url = url or redis_url()
    settings: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "protocol": 2,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.05), 30),
    }
    try:
        client = redis.Redis.from_url(url, **{**settings, **options})
    except ValueError as error:
        raise ConfigError(f"{without_password(url)!r} is not a Redis URL: {error}") from None
    _check_server(url)
    return client


def _check_server(url: str) -> None:
    probe = redis.Redis.from_url(
        url, socket_timeout=5.0, socket_connect_timeout=5.0, protocol=2, retry=Retry(ExponentialBackoff(), 1)
    )
    try:
        version = str(probe.info("server")["redis_version"])
    except redis.AuthenticationError:
        raise ConnectionFailed(
            f"Redis at {without_password(url)} refused the password: check the URL's user and password"
        ) from None
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise ConnectionFailed(
            f"cannot reach Redis at {without_password(url)} ({str(error).rstrip('.')}). "
            "Start it, or set SLUICE_REDIS_URL to the server to use"
        ) from None
    finally:
        probe.close()
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_SERVER:
        raise ConnectionFailed(f"Redis at {without_password(url)} is version {version}; Sluice needs 6.2 or newer")
