"""Waiting for a Redis that is unavailable or refuses writes: bounded, reported in words, visible to every thread.

A call that fails for one of the reasons below is repeated until it succeeds or the limit has passed; everything else (a
script's own error, a wrong type, a refused password) surfaces at once. Repeating is safe because every write of ours is an
idempotent script or command. redis-py nests retried calls (a command connects, a connection checks its health): only the
outermost one waits, so that the limit is one limit.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from sluice.common.errors import ConnectionFailed

OUTAGE_S = 600.0
"""Longest wait of a role for its data server: a restart, a move or more memory takes less."""
FIRST_REPORT_S = 2.0
REPORT_EVERY_S = 5.0

log = logging.getLogger("sluice.redis")

_REFUSALS = {
    "OOM": "is out of memory (maxmemory): writing pauses",
    "MISCONF": "cannot write its data to disk (disk full?): writing pauses",
    "READONLY": "is a read-only replica (fail-over?): writing pauses",
    "MASTERDOWN": "has lost its master: waiting",
    "NOREPLICAS": "has too few replicas in reach (min-replicas-to-write): writing pauses",
    "LOADING": "is loading its data: waiting",
    "BUSY": "is busy with a long script: waiting",
    "UNBLOCKED": "was demoted to a replica: waiting",
}
_CODE = re.compile(rf"(?:^|caused error: |: -)({'|'.join(_REFUSALS)}) ")
"""redis-py strips the codes it has classes for; a pipeline puts the command before it, an old server the script's line."""
_CLASSES = {
    redis.OutOfMemoryError: "OOM",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.BusyLoadingError: "LOADING",
}


def refusal(error: BaseException) -> str | None:
    """Return why a server refuses for now, in words; None when the error is not a temporary refusal."""
    for kind, code in _CLASSES.items():
        if isinstance(error, kind):
            return _REFUSALS[code]
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return _REFUSALS[found[1]] if found else None


class RefusesWrites(redis.ConnectionError):
    """A refusal, in words, for callers that only know lost connections (Celery)."""


def _trouble(error: BaseException) -> str | None:
    """Return what to wait for, as a predicate of "Redis at ..."; None when waiting is of no use."""
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        return None
    if isinstance(error, RefusesWrites):
        return str(error)
    if words := refusal(error):
        return words
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return "does not answer: connecting again"
    if isinstance(error, (redis.ConnectionError, OSError)):
        reason = re.sub(r"^Error -?\d+ connecting to \S+\. ", "", str(error)).rstrip(".")
        return f"is unreachable ({reason}): waiting"
    return None


def not_permitted(error: BaseException) -> str | None:
    """Return what an ACL refused, to a command or inside a script, and what to do about it; None for any other error."""
    text = str(error)
    in_script = "ACL failure" in text or "user executing the script can't" in text
    if not isinstance(error, redis.exceptions.NoPermissionError) and not in_script:
        return None
    return (
        f"does not permit this: {text.rstrip('.')}. Is SLUICE_REDIS_URL that of the right role? "
        "config/redis/users.acl says what each may do (docs/security.md)"
    )


class OutageRetry(Retry):
    """The retry policy of one client, shared by all its connections and threads."""

    def __init__(self, server: str, *, limit_s: float = OUTAGE_S) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.05), -1, (redis.RedisError, OSError))
        self.server = server
        self.limit_s = limit_s
        self._thread = threading.local()
        self._lock = threading.RLock()
        self._waiting: dict[int, tuple[float, str]] = {}
        self._reported_at: float | None = None

    def __deepcopy__(self, memo: Any) -> OutageRetry:
        return self  # redis-py copies the policy into each connection; the outage is one

    def update_supported_errors(self, specified_errors: Any) -> None:
        """Ignore redis-py's list: `_trouble` decides which errors are waited for."""

    @property
    def outage(self) -> str | None:
        """Why nothing moves, in a sentence; None while no call waits."""
        with self._lock:
            if not self._waiting:
                return None
            since, trouble = min(self._waiting.values())
        return f"Redis at {self.server} {trouble}, for {time.monotonic() - since:.0f} s so far, at most {self.limit_s:.0f} s"

    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Any:
        """Retry as redis-py does, but bounded by time. The last error is raised when the limit has passed."""
        on_failure = fail if with_failure_count else lambda error, _: fail(error)
        if getattr(self._thread, "waits", False):  # the call around this one repeats both
            try:
                return do()
            except self._supported_errors as error:
                on_failure(error, 1)
                raise
        self._thread.waits = True
        try:
            return self._wait_out(do, on_failure, is_retryable)
        finally:
            self._thread.waits = False
            self._waiting.pop(threading.get_ident(), None)

    def _wait_out(self, do: Any, fail: Any, is_retryable: Any) -> Any:
        began, since, failures = time.monotonic(), None, 0
        while True:
            try:
                reply = do()
            except self._supported_errors as error:
                if words := not_permitted(error):
                    raise ConnectionFailed(f"Redis at {self.server} {words}") from None
                trouble = _trouble(error)
                if trouble is None or (is_retryable and not is_retryable(error)):
                    raise
                failures += 1
                fail(error, failures)
                now = time.monotonic()
                if since is None:  # a time-out was silence since the call began
                    since = began if isinstance(error, (redis.TimeoutError, TimeoutError)) else now
                self._note(since, trouble)
                if failures > 1 and now - since >= self.limit_s:
                    what = trouble.rpartition(":")[0]
                    level = logging.ERROR if now - since >= FIRST_REPORT_S else logging.DEBUG
                    log.log(level, "Redis at %s %s: no longer waited for after %.0f s", self.server, what, now - since)
                    raise
                time.sleep(self._backoff.compute(min(failures, 10)))
            else:
                if since is not None:
                    self._over(since)
                return reply

    def _note(self, since: float, trouble: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._waiting[threading.get_ident()] = (since, trouble)
            is_due = self._reported_at is None or now - self._reported_at >= REPORT_EVERY_S
            if now - since >= FIRST_REPORT_S and is_due:
                self._reported_at = now
                log.warning("%s", self.outage)

    def _over(self, since: float) -> None:
        with self._lock:
            self._waiting.pop(threading.get_ident(), None)
            if self._waiting or self._reported_at is None:
                return
            self._reported_at = None
        log.warning("Redis at %s is back after %.0f s", self.server, time.monotonic() - since)
