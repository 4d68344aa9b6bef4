"""The trainer's heartbeat, and its report of a stall: what it waits for, in the log, the metrics and the heartbeat.

Reports come from the heartbeat thread, also while the trainer itself waits: for a batch, for a publication, for room on a
disk, or for Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import redis

from sluice.common.connections.client import outage
from sluice.common.errors import DiskFull
from sluice.common.monitoring.diagnosis import Cause, diagnose
from sluice.common.monitoring.heartbeats import HeartbeatThread, connect_quickly
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.run import Run, process_name

log = logging.getLogger("sluice.trainer")

DiskRetry = Callable[[Callable[[], object]], None]
"""Makes a write, again and again while the disk is full: a trainer's `retry_while_disk_full`."""
STREAMED_EVERY_S = 60.0
"""How often a lasting stall is an entry of the metrics stream, besides its beginning: readers look at the newest few."""
DISK_RETRY_S = 3.0
"""While a disk is full, how often the trainer tries again."""


class TrainerHeartbeat:
    """Sends heartbeats until closed; reports a stall every `trainer.stall_report_s`."""

    def __init__(self, trainer: redis.Redis, run: Run, *, report: Callable[[int, Cause, float], None]) -> None:
        """Start the thread. trainer: the client that the trainer itself uses. report: records a stall besides the log, with
        the step before it and its seconds."""
        self._trainer, self._run, self._report_to = trainer, run, report
        self.confirm: Callable[[redis.Redis], None] = lambda client: None
        "called after each heartbeat: confirms the policy pointer"
        self._stats: dict[str, Any] = {"step": 0, "version": 0, "doing": "starting"}
        self.alarm = ""
        self._since: dict[str, float] = {}
        "start of each wait: `outage` of the trainer's client, `alarm`, `batch`; and `unreachable` for our own client"
        self._reported_at = 0.0
        self._streamed = "", 0.0
        self._client = connect_quickly()
        began = time.monotonic()
        self._thread = HeartbeatThread(
            self._client,
            run.keys,
            process_name("trainer"),
            stats=lambda: self._all_stats(up_s=time.monotonic() - began),
            before=self._look_at_the_trainers_client,
            after=self._after_heartbeat,
            on_error=self._report_unreachable,
        )
        self._thread.start()

    def tell(self, **stats: Any) -> None:
        """Add stats to the next heartbeats."""
        self._stats = self._stats | stats

    def waits(self) -> None:
        """Note that the trainer waits for a batch from now on."""
        self._since["batch"] = time.monotonic()

    def moves(self) -> None:
        """Note that the trainer has a batch."""
        self._since.pop("batch", None)

    def retry_while_disk_full(self, is_stopping: Callable[[], bool], write: Callable[[], object]) -> None:
        """Write a file; the heartbeat shows an alarm while there is no room. Raises DiskFull when told to stop meanwhile."""
        while True:
            try:
                write()
            except DiskFull as error:
                if not self.alarm:
                    log.error("training pauses: %s", error)
                self._since.setdefault("alarm", time.monotonic())
                self.alarm = f"training pauses: {error}"
                if is_stopping():
                    raise
                time.sleep(DISK_RETRY_S)
            else:
                break
        if since := self._since.pop("alarm", None):
            log.info("over after %.0f s: %s", time.monotonic() - since, self.alarm)
        self.alarm = ""

    @property
    def waiting_s(self) -> float:
        """Seconds that the trainer has been waiting."""
        since = next((at for reason in ("outage", "alarm", "batch") if (at := self._since.get(reason))), None)
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        self._thread.close()

    def _all_stats(self, *, up_s: float) -> dict[str, Any]:
        own = {"role": "trainer", "waiting_s": round(self.waiting_s, 1), "alarm": self.alarm, "up_s": round(up_s, 1)}
        return own | self._stats

    def _look_at_the_trainers_client(self) -> None:
        """Count a call of the trainer that waits for Redis as a stall too, wherever in the step it is."""
        if outage(self._trainer) is None:
            self._since.pop("outage", None)
        else:
            self._since.setdefault("outage", time.monotonic())

    def _after_heartbeat(self) -> None:
        self.confirm(self._client)
        self._report_stall()

    def _report_stall(self) -> None:
        self._since.pop("unreachable", None)
        waited_s = self.waiting_s
        if waited_s < self._run.config.trainer.stall_report_s or self._is_reported():
            return
        cause = Cause("alarm", self.alarm) if self.alarm else diagnose(self._client, self._run)
        self._report(cause, waited_s=waited_s)
        now = time.monotonic()
        if cause.kind != self._streamed[0] or now - self._streamed[1] > STREAMED_EVERY_S:
            self._streamed = cause.kind, now
            line = {"step": self._stats["step"], f"stall/{cause.kind}": waited_s}
            write_metrics(self._client, self._run.keys, line, max_length=self._run.config.metrics.stream_length)

    def _report_unreachable(self, error: redis.RedisError) -> None:
        waited_s = time.monotonic() - self._since.setdefault("unreachable", time.monotonic())
        if not self._is_reported():
            self._report(Cause("redis_unreachable", f"Redis cannot be used: {error}"), waited_s=waited_s)

    def _is_reported(self) -> bool:
        return time.monotonic() - self._reported_at < self._run.config.trainer.stall_report_s

    def _report(self, cause: Cause, *, waited_s: float) -> None:
        self._reported_at = time.monotonic()
        log.warning("trainer has waited %.0f s: %s", waited_s, cause.text)
        self._report_to(self._stats["step"], cause, waited_s)
