"""What the tasks of one worker process share, and the one way they run a stage: claim, work, store, send the next.

    message --> claim --refused--> nothing (done, or another worker holds it)
                  |
                 work --EngineClosed--> released: sent again, no attempt spent
                  |   --other error---> failed: sent again by the reaper, or dead-lettered with the traceback
                 store --refused-----> nothing (another attempt was faster)
                  |
                 messages for the next stages

Before each heartbeat the leases of running stages are renewed, up to one lease after the last progress; a process without
progress for two leases (an endless loop in a kernel, a hung device) ends itself, so that it stops claiming groups. What a stage
has made travels with the renewal, and its first progress at once: a claim that is lost after it spends no attempt.

SIGUSR2 = SIGTERM with more time: no new messages, and running stages may finish for autoscale.drain_s. A later SIGTERM ends that.

A stage whose group would die with its claim runs exclusively in its process: a poison prompt that kills the process then takes
no other stage with it, and a stage that only ran beside a poison prompt gets an attempt that no other stage can spoil.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import redis
from celery import Celery
from celery.concurrency.thread import TaskPool

from sluice.common.connections.broker import send, send_stage
from sluice.common.connections.client import check_broker, connect, give_up_after, run_name
from sluice.common.errors import EngineClosed, SerializationError, raised_at
from sluice.common.ledger.ledger import Claim, Ledger
from sluice.common.monitoring.heartbeats import HEARTBEAT_S, HeartbeatThread, connect_quickly
from sluice.common.run import Run, open_run, process_name
from sluice.workers.execution_lock import ExecutionLock
from sluice.workers.work_log import WorkLog

log = logging.getLogger("sluice.worker")

HUNG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h."""
FIRST_PROGRESS_S = 0.1
"""How soon the first progress of a stage is in the ledger: a worker that is killed later than that costs it no attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a stage: arguments of Ledger.store."""

    payload: bytes
    version: int | None = None
    "rollout only: the oldest policy version of its tokens"
    num_tokens: int = 0
    "rollout only"
    is_zero_variance: bool = False
    "reward only: the rewards are equal, and the group is dropped unless the trainer would starve"


@dataclass(kw_only=True)
class Context:
    """One worker process: its run, its connections and its running stages."""

    role: str
    app: Celery
    client: redis.Redis
    run: Run
    ledger: Ledger
    urgent: Ledger
    "over a connection that fails within seconds: for the heartbeat thread and event loops, which must not hang in a command"
    process: str
    progress_age_s: Callable[[], float] = lambda: 0.0
    "seconds since the engine last made progress: leases end one lease after it, the process after two"
    progress: Callable[[], Mapping[str, int]] | None = None
    "group -> tokens generated, or turns made, of what runs; none = its stages make no progress that could be told"
    stats: Callable[[], dict[str, Any]] = dict
    "what this process adds to its heartbeat"
    busy_s: Callable[[], float] = lambda: 0.0
    "seconds of work so far, of the engine, model or reader of the process"
    started_at: float = field(default_factory=time.time)
    num_done: int = 0
    _heartbeat: HeartbeatThread | None = None
    _heartbeat_at: float = field(default_factory=time.monotonic)
    _heartbeat_busy_s: float = 0.0
    _claims: dict[str, Claim] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)
    "holders of claims whose progress is in the ledger"
    _work_log: WorkLog = field(init=False)
    _lock: ExecutionLock = field(default_factory=ExecutionLock)
    _is_closed: threading.Event = field(default_factory=threading.Event)
    _was_hung: bool = False
    _is_draining: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._work_log = WorkLog(self.role)

    @classmethod
    def drain(cls, *_: object) -> None:
        """Handle SIGUSR2."""
        cls._is_draining = True
        os.kill(os.getpid(), signal.SIGTERM)

    def consume_grace_period_s(self) -> float:
        """Return the seconds that running stages have when the process is told to end: autoscale.drain_s once after SIGUSR2."""
        was_draining, Context._is_draining = Context._is_draining, False
        config = self.run.config
        return config.autoscale.drain_s if was_draining else config.lease.shutdown_grace_s

    @classmethod
    def open(cls, app: Celery, role: str) -> Context:
        """Connect and read the run. Raises ConfigError, ConnectionFailed."""
        client = connect()
        check_broker()
        run = open_run(client, run_name())
        process = process_name(role)
        ledger = Ledger(client, run.keys, run.config, worker=process)
        urgent = Ledger(connect_quickly(), run.keys, run.config, worker=process)
        return cls(role=role, app=app, client=client, run=run, ledger=ledger, urgent=urgent, process=process)

    def run_stage(
        self,
        group_id: str,
        stage: str,
        work: Callable[[Claim], Result],
        *,
        fields: tuple[str, ...],
        lease_s: float | None = None,
    ) -> None:
        """Run one stage of one group, beside others unless this is its last chance."""
        claim = partial(self.ledger.claim, group_id, stage, fields=fields, lease_s=lease_s)
        with self._lock.held(exclusive=False) as acquired:
            # before the claim: one that waits would be lost if its process were killed
            is_last = self.ledger.is_last_chance(group_id, stage)
            if acquired and not is_last:
                self._work_on(claim(), work)
        if is_last:
            with self._lock.held(exclusive=True) as acquired:
                if acquired:
                    self._work_on(claim(), work)

    def _work_on(self, claim: Claim | None, work: Callable[[Claim], Result]) -> None:
        if claim is None:
            return
        group_id, stage = claim.group_id, claim.stage
        with self._renewing(claim):
            try:
                result = work(claim)
            except EngineClosed:
                if self.ledger.release(claim):
                    send_stage(self.app, group_id, stage)
                return
            except Exception as error:  # the task boundary: every error of a stage is counted, never lost
                log.warning("%s of group %s failed on attempt %d: %r", stage, group_id, claim.attempt, error)
                what, place = repr(error), raised_at(error)
                what += "" if place in what else f" at {place}"  # a reward's error names its place itself
                detail = f"{what}\n{traceback.format_exc(limit=-8)}"
                reason = "undecodable" if isinstance(error, SerializationError) else type(error).__name__
                self.ledger.fail(claim, reason=reason, detail=detail)
                return
            # may wait for Redis; the lease is renewed meanwhile
            following = self.ledger.store(group_id, stage, **asdict(result))
        for name in following or ():
            send_stage(self.app, group_id, name)
        if result.is_zero_variance and following is not None:
            send(self.app, "dataset.fill", "dataset")  # its credit is free: admit another prompt
        self.num_done += 1

    @contextmanager
    def _renewing(self, claim: Claim) -> Iterator[None]:
        self._claims[claim.holder] = claim
        try:
            yield
        finally:
            del self._claims[claim.holder]
            self._reported.discard(claim.holder)

    def start_heartbeat(self) -> None:
        """Begin to renew leases and to send heartbeats."""
        self._heartbeat = HeartbeatThread(
            self.urgent.client,
            self.run.keys,
            self.process,
            stats=self._stats,
            before=self._keep_leases,
            period_s=min(HEARTBEAT_S, self.run.config.lease.running_s / 3),
        )
        self._heartbeat.start()
        if self.progress is not None:
            threading.Thread(target=self._report_first_progress, name="first progress", daemon=True).start()

    def _report_first_progress(self) -> None:
        while not self._is_closed.wait(FIRST_PROGRESS_S):
            claims = [claim for claim in list(self._claims.values()) if claim.holder not in self._reported]
            try:
                if claims and (made := self._progress()):
                    self._renew([claim for claim in claims if made.get(claim.group_id)], made)
            except redis.RedisError:
                continue  # the heartbeat thread says it

    def _progress(self) -> Mapping[str, int]:
        return self.progress() if self.progress is not None else {}

    def _renew(self, claims: list[Claim], made: Mapping[str, int]) -> set[str]:
        """Renew leases, up to one lease after the last progress of the process; return those that are lost."""
        left_s = self.run.config.lease.running_s - self.progress_age_s()
        if left_s <= 0:
            return set()
        lost = set(self.urgent.renew(claims, lease_s=left_s, progress=made))
        self._reported |= {
            claim.holder for claim in claims if made.get(claim.group_id) and claim.holder in self._claims
        }
        return lost

    def _keep_leases(self) -> None:
        self._end_if_hung()
        claims = list(self._claims.values())
        lost = self._renew(claims, self._progress())
        for claim in claims:
            # a stage whose result was stored meanwhile has no lease any more either
            if f"{claim.group_id}|{claim.stage}" in lost and claim.holder in self._claims:
                text = "lost the lease of %s of group %s (reassigned, or the group is settled): a late result will be refused"
                log.warning(text, claim.stage, claim.group_id)

    def _end_if_hung(self) -> None:
        """End a process whose engine hangs, which cannot be stopped from inside; a supervisor starts it again.

        Seen at two heartbeats in a row: after a pause of the process (SIGSTOP) the engine gets one period to make progress.
        """
        age_s = self.progress_age_s()
        is_hung = age_s > 2 * self.run.config.lease.running_s
        if is_hung and self._was_hung:
            log.critical("no progress for %.0f s: ending this process, its groups are reassigned", age_s)
            logging.shutdown()
            os._exit(HUNG_EXIT_CODE)
        self._was_hung = is_hung

    def _stats(self) -> dict[str, Any]:
        now, busy_s = time.monotonic(), self.busy_s()
        idle = 1.0 - (busy_s - self._heartbeat_busy_s) / max(now - self._heartbeat_at, 1e-9)
        self._heartbeat_at, self._heartbeat_busy_s = now, busy_s
        stats = {
            "idle_fraction": round(min(1.0, max(0.0, idle)), 3),
            "role": self.role,
            "pid": int(self.process.rpartition(":")[2]),
            "host": self.process.partition("@")[2].rpartition(":")[0],
            "up_s": round(time.time() - self.started_at, 1),
            "running": len(self._claims),
            "done": self.num_done,
            **self.stats(),
        }
        self._work_log.update(stats, busy_s=busy_s)
        return stats

    def close(self) -> None:
        """Stop the heartbeat thread and the connection gracefully."""
        self._is_closed.set()
        give_up_after(self.client, 2.0)
        if self._heartbeat is not None:
            self._heartbeat.close()


class CooperativePool(TaskPool):
    """Threads that are asked to stop: SIGQUIT and revoke call `cancel` instead of raising NotImplementedError."""

    cancel: Callable[[], None] = staticmethod(lambda: None)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        type(self).cancel()
