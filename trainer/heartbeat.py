"""The trainer's heartbeat, and its word when it does not move: what it waits for, in the log, the metrics and its heartbeat.

It runs in a thread of its own over a connection of its own that gives up quickly, so that it speaks also while the trainer
itself waits: for a batch, for a publication, for room on a disk, or for Redis.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections.client import connect, outage
from sluice.common.monitoring.diagnosis import Cause, diagnose
from sluice.common.monitoring.metrics import HEARTBEAT_S, remove_heartbeat, send_heartbeat, write_metrics
from sluice.common.run import Run

log = logging.getLogger("sluice.trainer")

STREAMED_EVERY_S = 60.0
"""How often a stall that lasts is an entry of the metrics stream, besides its beginning: readers look at the newest few."""


class TrainerHeartbeat:
    """Beats until closed; reports a stall every `trainer.stall_report_s`."""

    def __init__(self, run: Run, trainer: redis.Redis, *, process: str, stats: Callable[[], dict[str, Any]]) -> None:
        """`trainer` is the client over which the trainer itself works."""
        self.report: Callable[[Cause, float], None] = lambda cause, waited_s: None
        "where a stall is recorded besides the log"
        self.alarm = ""
        self._alarm_since = 0.0
        self._outage_since: float | None = None
        self._run = run
        self._trainer = trainer
        self._process = process
        self._stats = stats
        self._client = connect(retry=Retry(NoBackoff(), 1), socket_timeout=3.0)
        self._waiting_since: float | None = None
        self._away_since: float | None = None
        self._reported_at = 0.0
        self._streamed = "", 0.0
        self._closed = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run_until_closed, name="heart", daemon=True)
        self._thread.start()

    def waits(self) -> None:
        """The trainer has nothing to do from now on."""
        self._waiting_since = time.monotonic()

    def moves(self) -> None:
        """The trainer has something to do."""
        self._waiting_since = None

    def raise_alarm(self, text: str) -> None:
        """What keeps this process from its work, for everybody to read."""
        if not self.alarm:
            self._alarm_since = time.monotonic()
            log.error("%s", text)
        self.alarm = text

    def clear_alarm(self) -> None:
        if self.alarm:
            log.info("over after %.0f s: %s", time.monotonic() - self._alarm_since, self.alarm)
        self.alarm = ""

    @property
    def waiting_s(self) -> float:
        """Seconds since the trainer could last do something."""
        if self._outage_since is not None:
            return time.monotonic() - self._outage_since
        since = self._alarm_since if self.alarm else self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=10)
        try:
            remove_heartbeat(self._client, self._run.keys, self._process)
        except redis.RedisError as error:
            log.warning("could not sign off: %s", error)

    def _run_until_closed(self) -> None:
        while not self._closed.is_set():
            self._look_at_the_trainers_client()
            stats = {"role": "trainer", "waiting_s": round(self.waiting_s, 1), "alarm": self.alarm}
            stats |= {"up_s": round(time.monotonic() - self._began, 1), **self._stats()}
            try:
                send_heartbeat(self._client, self._run.keys, self._process, stats)
                self._away_since = None
                self._report_stall()
            except redis.RedisError as error:
                self._away_since = self._away_since or time.monotonic()
                cause = Cause("redis_unreachable", f"Redis cannot be used: {error}")
                self._report(cause, waited_s=time.monotonic() - self._away_since)
            self._closed.wait(HEARTBEAT_S)

    def _look_at_the_trainers_client(self) -> None:
        """A call of the trainer that waits for Redis is a stall as well, wherever in the step it is."""
        if outage(self._trainer) is None:
            self._outage_since = None
        elif self._outage_since is None:
            self._outage_since = time.monotonic()

    def _report_stall(self) -> None:
        waited_s = self.waiting_s
        if waited_s < self._run.config.trainer.stall_report_s or self._is_reported():
            return
        cause = Cause("alarm", self.alarm) if self.alarm else diagnose(self._client, self._run)
        self._report(cause, waited_s=waited_s)
        now = time.monotonic()
        if cause.kind != self._streamed[0] or now - self._streamed[1] > STREAMED_EVERY_S:
            self._streamed = cause.kind, now
            line = {"step": self._stats()["step"], f"stall/{cause.kind}": waited_s}
            write_metrics(self._client, self._run.keys, line, max_length=self._run.config.metrics.stream_length)

    def _is_reported(self) -> bool:
        return time.monotonic() - self._reported_at < self._run.config.trainer.stall_report_s

    def _report(self, cause: Cause, *, waited_s: float) -> None:
        if self._is_reported():
            return
        self._reported_at = time.monotonic()
        log.warning("trainer has waited %.0f s: %s", waited_s, cause.text)
        self.report(cause, waited_s)
