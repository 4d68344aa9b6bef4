"""What the tasks of one worker process share, and the one way they do a part: claim, work, store, send on.

    message --> claim --refused--> nothing (done, or somebody else has it)
                  |
                 work --EngineClosed--> released: handed back, no attempt spent
                  |   --other error---> failed: sent again, or dead-lettered with the traceback
                 store --refused-----> nothing (another attempt was faster)
                  |
                 messages for the parts that follow

The heart thread beats, and renews the leases of running parts up to one lease after the last progress; a process that
makes none for two leases (an endless loop in a kernel, a hung device) is ended, so that it does not go on pulling groups.

SIGUSR2 = SIGTERM with more time: no new messages, and running parts may finish for autoscale.drain_s. A later SIGTERM ends that.

A part on its last attempt is worked on alone in its process. If it kills the process (a poison prompt) it takes nobody
with it, and one that was only beside a poison prompt gets an attempt that nobody else can spoil.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import redis
from celery import Celery
from celery.concurrency.thread import TaskPool
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections.broker import send, send_stage
from sluice.common.connections.client import connect, give_up_after, run_name
from sluice.common.errors import EngineClosed, SerializationError
from sluice.common.ledger.ledger import Claim, Ledger
from sluice.common.monitoring.metrics import HEARTBEAT_S, remove_heartbeat, send_heartbeat
from sluice.common.run import Run, open_run, process_name
from sluice.workers.execution_lock import ExecutionLock

log = logging.getLogger("sluice.worker")

HUNG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished part."""

    payload: bytes
    version: int | None = None
    "rollout only: the oldest policy version of its tokens"
    num_tokens: int = 0
    "rollout only"
    is_zero_variance: bool = False
    "reward only: the group teaches nothing, and is dropped unless the trainer would starve"


@dataclass(kw_only=True)
class Context:
    """One worker process: its run, its connections and the parts it is working on."""

    role: str
    app: Celery
    client: redis.Redis
    run: Run
    ledger: Ledger
    urgent: Ledger
    "over a connection that gives up within seconds: for the heart, and for event loops, which must not hang in a command"
    process: str
    progress_age_s: Callable[[], float] = lambda: 0.0
    "seconds since the engine last made progress: leases end one lease after it, the process after two"
    stats: Callable[[], dict[str, Any]] = dict
    "what this process adds to its heartbeat"
    busy_s: Callable[[], float] = lambda: 0.0
    "seconds of work so far, of whatever the process has one of: an engine, a model, a reader"
    started_at: float = field(default_factory=time.time)
    num_done: int = 0
    _heartbeat_at: float = field(default_factory=time.monotonic)
    _heartbeat_busy_s: float = 0.0
    _claims: dict[str, Claim] = field(default_factory=dict)
    _lock: ExecutionLock = field(default_factory=ExecutionLock)
    _was_hung: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _is_draining: ClassVar[bool] = False

    @classmethod
    def drain(cls, *_: object) -> None:
        """Handler of SIGUSR2."""
        cls._is_draining = True
        os.kill(os.getpid(), signal.SIGTERM)

    def consume_grace_period_s(self) -> float:
        """Seconds that running parts have when the process is told to end: autoscale.drain_s once after SIGUSR2."""
        was_draining, Context._is_draining = Context._is_draining, False
        config = self.run.config
        return config.autoscale.drain_s if was_draining else config.lease.shutdown_grace_s

    @classmethod
    def open(cls, app: Celery, role: str) -> Context:
        """Connect and read the run. Raises ConfigError, ConnectionFailed."""
        client = connect()
        run = open_run(client, run_name())
        process = process_name(role)
        ledger = Ledger(client, run.keys, run.config, worker=process)
        quick = connect(retry=Retry(NoBackoff(), 1), socket_timeout=3.0)
        urgent = Ledger(quick, run.keys, run.config, worker=process)
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
        """Do one part of one group, beside others unless this is its last attempt."""
        do = partial(self._run_stage, group_id, stage, work, fields=fields, lease_s=lease_s)
        with self._lock.shared() as acquired:
            is_last = self._is_last_attempt(group_id, stage)
            if acquired and not is_last:
                do()
        if is_last:
            with self._lock.exclusive() as acquired:
                if acquired:
                    do()

    def _is_last_attempt(self, group_id: str, stage: str) -> bool:
        """Asked before the claim: a claim that waits would spend the attempt if its process were killed."""
        most = self.run.config.lease.max_attempts
        spent = int(self.client.hget(self.run.keys("g", group_id), f"n:{stage}") or 0)
        return spent + 1 >= most > 1

    def _run_stage(
        self,
        group_id: str,
        stage: str,
        work: Callable[[Claim], Result],
        *,
        fields: tuple[str, ...],
        lease_s: float | None,
    ) -> None:
        claim = self.ledger.claim(group_id, stage, fields=fields, lease_s=lease_s)
        if claim is None:
            return
        with self._working_on(claim):
            try:
                result = work(claim)
            except EngineClosed:
                if self.ledger.release(claim):
                    send_stage(self.app, group_id, stage)
                return
            except Exception as error:  # the task boundary: whatever a part raises is accounted for, never lost
                log.warning("%s of group %s failed on attempt %d: %r", stage, group_id, claim.attempt, error)
                detail = f"{error!r}\n{traceback.format_exc(limit=-8)}"
                if self.ledger.fail(claim, reason=_reason(error), detail=detail):
                    send_stage(self.app, group_id, stage)
                return
            following = self._store(claim, result)  # may wait for Redis; the lease is kept meanwhile
        for name in following or ():
            send_stage(self.app, group_id, name)
        if result.is_zero_variance and following is not None:
            send(self.app, "dataset.fill", "dataset")  # its credit is free: another prompt takes its place
        self.num_done += 1

    def _store(self, claim: Claim, result: Result) -> list[str] | None:
        return self.ledger.store(
            claim.group_id,
            claim.stage,
            result.payload,
            version=result.version,
            num_tokens=result.num_tokens,
            is_zero_variance=result.is_zero_variance,
        )

    @contextmanager
    def _working_on(self, claim: Claim) -> Iterator[None]:
        self._claims[claim.holder] = claim
        try:
            yield
        finally:
            del self._claims[claim.holder]

    def start_heartbeat(self) -> None:
        """Begin to renew leases and to beat."""
        threading.Thread(target=self._send_heartbeats, name="heart", daemon=True).start()

    def _send_heartbeats(self) -> None:
        period = min(HEARTBEAT_S, self.run.config.lease.running_s / 3)
        while not self._stop.wait(period):
            try:
                self._end_if_hung()
                left_s = self.run.config.lease.running_s - self.progress_age_s()
                if left_s > 0:
                    self._renew(left_s)
                send_heartbeat(self.urgent.client, self.run.keys, self.process, self._stats())
            except redis.RedisError as error:
                log.warning("no heartbeat: %s", error)

    def _renew(self, lease_s: float) -> None:
        claims = list(self._claims.values())
        lost = set(self.urgent.renew(claims, lease_s=lease_s))
        for claim in claims:
            # one that was handed in meanwhile has no lease any more either
            if f"{claim.group_id}|{claim.stage}" in lost and claim.holder in self._claims:
                log.warning(
                    "lost the lease of %s of group %s: it was taken over, or its group is settled; a late result will be refused",
                    claim.stage,
                    claim.group_id,
                )

    def _end_if_hung(self) -> None:
        """A hung engine cannot be stopped from inside; the process can, and a supervisor starts it again.

        Seen at two beats in a row: after a pause of the whole process (SIGSTOP) the engine gets one beat to move again.
        """
        age_s = self.progress_age_s()
        is_hung = age_s > 2 * self.run.config.lease.running_s
        if is_hung and self._was_hung:
            log.critical("no progress for %.0f s: ending this process, its groups are taken over", age_s)
            logging.shutdown()
            os._exit(HUNG_EXIT_CODE)
        self._was_hung = is_hung

    def _stats(self) -> dict[str, Any]:
        now, busy_s = time.monotonic(), self.busy_s()
        idle = 1.0 - (busy_s - self._heartbeat_busy_s) / max(now - self._heartbeat_at, 1e-9)
        self._heartbeat_at, self._heartbeat_busy_s = now, busy_s
        return {
            "idle_fraction": round(min(1.0, max(0.0, idle)), 3),
            "role": self.role,
            "pid": int(self.process.rpartition(":")[2]),
            "host": self.process.partition("@")[2].rpartition(":")[0],
            "up_s": round(time.time() - self.started_at, 1),
            "running": len(self._claims),
            "done": self.num_done,
            **self.stats(),
        }

    def close(self) -> None:
        """Leave in good order."""
        self._stop.set()
        give_up_after(self.client, 2.0)
        try:
            remove_heartbeat(self.urgent.client, self.run.keys, self.process)
        except redis.RedisError as error:
            log.warning("could not sign off: %s", error)


def _reason(error: BaseException) -> str:
    return "undecodable" if isinstance(error, SerializationError) else type(error).__name__


class CooperativePool(TaskPool):
    """Threads that are asked to stop: SIGQUIT and revoke call `cancel` instead of raising NotImplementedError."""

    cancel: Callable[[], None] = staticmethod(lambda: None)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        type(self).cancel()
