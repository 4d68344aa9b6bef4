"""`sluice run`'s process tree: starts every role, restarts a dead one, ends all of them in order.

    redis (embedded, if no URL is given) --> workers, one process per replica --> trainer
    a worker or trainer that exits is started again after 0.5, 1, 2, ... seconds; MAX_CRASHES within CRASH_WINDOW_S end the run.
    The user is told of the exit, and when the role works again
    while Redis is unavailable nothing is started, so a role that died of that dies once
    one that the run can do without (the dashboard) is not restarted then, and the user is told
    exit 0 (another process sent SIGTERM) counts as one, but the role is started again at once; of the trainer at its last step,
    or of a drain, it ends the run gracefully; exit 2 (bad input) at the first start ends it with the reason, exit 3 (diverged,
    or only losing groups) ends it always
    scale() starts workers of a queue or drains them: SIGUSR2, after autoscale.drain_s SIGTERM, STOP_S later SIGKILL. The exit
    of a drained worker is neither a crash nor a restart
    Ctrl-C or SIGTERM: trainer and workers get SIGTERM; what still lives after STOP_S is killed, except a trainer that
    sends heartbeats: it may be writing a checkpoint, and has TRAINER_STOP_S

Roles with a model are forked from a process that has imported torch (`fork_server`); when it is killed, so are they, and they are
started again as after any other death. The kernel signals children when their parent dies, so even SIGKILL of the supervisor
leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluice.common.config import Config
from sluice.common.disk import cut
from sluice.common.errors import Hopeless, RunFailed
from sluice.scripts.launcher.fork_server import ForkServer
from sluice.scripts.launcher.processes import Process, signal_group, spawn
from sluice.scripts.launcher.roles import (
    Role,
    key_environment,
    planned_workers,
    trainer_role,
    worker_bounds,
    worker_role,
)

STOP_S = 7.0
TRAINER_STOP_S = 120.0
MAX_CRASHES = 5
CRASH_WINDOW_S = 60.0
MAX_LOG_BYTES = 16 << 20
"""Of a role's log, and of the part before it, `NAME.log.1`."""
LOGS_EVERY_S = 10.0
POLL_S = 0.2
"""How often a trainer that ends is polled."""


@dataclass(kw_only=True)
class Child:
    """One supervised process."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    is_forked: bool = False
    pass_fds: tuple[int, ...] = ()
    process: Process | None = None
    crashes: list[float] = field(default_factory=list)
    start_at: float = 0.0
    ended_at: float | None = None
    "when it exited; none once it works again"
    started_at: float = 0.0
    num_restarts: int = 0
    is_needed: bool = True
    "false = the run continues without it"
    queue: str = ""
    "of a worker"
    replica: int = 0
    was_added: bool = False
    "by scale()"
    drained_at: float | None = None
    "when it was told to finish and go"
    told_to_stop: bool = False


class Supervisor:
    """Keeps the roles of one run alive until the trainer has finished."""

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        url: str,
        folder: Path,
        status: Callable[[], str],
        trainer_is_alive: Callable[[], bool],
        is_working: Callable[[str, int, float], bool] = lambda role, pid, age_s: False,
        extra: Iterable[Role] = (),
        say: Callable[[str], None] = print,
        write_event: Callable[..., None] = lambda event, **fields: None,
        key_file: Path | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        """`status` reads the run's; while Redis is unavailable it raises ConnectionError, and so does `poll` then.

        `trainer_is_alive`: whether the trainer sent a heartbeat in the last seconds; false while Redis is unavailable.
        `is_working`: whether a process that was started `age_s` seconds ago has loaded, by its role and pid; while Redis is
        unavailable it may raise ConnectionError. `extra`: roles that the run can do without; `say` reports when one is
        abandoned. `write_event` records deaths and restarts (metric_stream.write_event); what it raises, `poll` raises.
        `key_file`: the run's key, where the environment has none (common/policies/signing.py). `fork_server` starts the roles
        that may be forked; without it they are processes like the others.
        """
        self._fork_server = fork_server
        self._say, self._write_event, self._key_file = say, write_event, key_file
        self._status, self._trainer_is_alive, self._is_working = status, trainer_is_alive, is_working
        env = {"SLUICE_REDIS_URL": url, "SLUICE_REDIS_URL_FILE": "", "SLUICE_RUN": run}
        env |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._config, self._env, self._logs = config, env, folder / "logs"
        self._logs_due = 0.0
        self._restarts: Counter[str] = Counter()  # of workers that have gone
        self._children = [self._worker(queue, i) for queue, i in planned_workers(config)]
        self._trainer = self._child(trainer_role(config))
        self._children += [self._trainer, *(self._child(role, is_needed=False) for role in extra)]

    def _worker(self, queue: str, replica: int, *, was_added: bool = False) -> Child:
        role = worker_role(self._config, queue, replica)
        return self._child(role, queue=queue, replica=replica, was_added=was_added)

    def _child(self, role: Role, **state: Any) -> Child:
        env = self._env | role.env | key_environment(role, self._key_file)
        log = self._logs / f"{role.name}.log"
        state |= {"is_forked": role.is_forked, "pass_fds": role.pass_fds}
        return Child(name=role.name, argv=role.argv, env=env, log=log, **state)

    def start(self) -> None:
        # those that are not forked first: they need not wait for the fork server's imports
        for child in sorted(self._children, key=lambda child: child.is_forked):
            self._start(child)

    def _start(self, child: Child) -> None:
        child.started_at = time.monotonic()
        if self._fork_server and child.is_forked:
            child.process = self._fork_server.start(child.argv, log=child.log, env=child.env)
        else:
            child.process = spawn(child.argv, log=child.log, env=child.env, pass_fds=child.pass_fds)

    def poll(self) -> bool:
        """Reap and restart. True while the trainer has not finished. Raises RunFailed."""
        self._poll_draining()
        self._bound_logs()
        for child in list(self._children):
            if child.drained_at is not None:
                continue
            code = child.process.poll() if child.process else None
            if code is None and child.process:
                continue
            # while Redis is unavailable no exit is judged, and nothing is started that could not work
            status = self._status()
            if child is self._trainer and code == 0 and status in ("finished", "drained"):
                return False
            if child.process:
                self._after_exit(child, code or 0)
            if child in self._children and time.monotonic() >= child.start_at:
                self._start(child)
                child.num_restarts += 1
                self._write_event("restarted", process=child.name)
        self._report_returned()
        return True

    def _report_returned(self) -> None:
        """Say of every role that was started again when it has loaded."""
        for child in self._children:
            if child.ended_at is None or child.process is None:
                continue
            now, role = time.monotonic(), child.queue.partition(",")[0] or child.name
            if self._is_working(role, child.process.pid, now - child.started_at):
                self._say(f"{child.name} works again, {now - child.ended_at:.1f} s after it ended")
                child.ended_at = None

    def _bound_logs(self) -> None:
        """Rotate logs that have grown over MAX_LOG_BYTES, every LOGS_EVERY_S."""
        if time.monotonic() < self._logs_due:
            return
        self._logs_due = time.monotonic() + LOGS_EVERY_S
        for log in self._logs.glob("*.log"):
            with suppress(OSError):  # a full disk
                cut(log, max_bytes=MAX_LOG_BYTES)

    def _after_exit(self, child: Child, code: int) -> None:
        child.process = None
        is_first = child.num_restarts == 0 and not child.was_added
        if code == 2 and is_first and child.is_needed:  # a later one may have been refused for a passing reason
            raise RunFailed(f"{child.name} refused its input:\n{_tail(child.log)}")
        if code == Hopeless.EXIT_CODE and child is self._trainer:
            said = [line for line in _tail(child.log, lines=100).splitlines() if line.startswith("error: ")]
            raise RunFailed(said[-1].removeprefix("error: ") if said else _tail(child.log), exit_code=code)
        now = time.monotonic()
        if child.is_needed and child.ended_at is None:
            child.ended_at = now
        child.crashes = [t for t in child.crashes if now - t < CRASH_WINDOW_S] + [now]
        if len(child.crashes) >= MAX_CRASHES:
            died = f"{child.name} died {len(child.crashes)} times"
            if not child.is_needed:
                self._children.remove(child)
                self._say(f"{died} and is not started again (its log: {child.log})")
                return
            within = f"within {CRASH_WINDOW_S:.0f} s (last exit code {code})"
            raise RunFailed(f"{died} {within}; its log {child.log} ends:\n{_tail(child.log)}")
        wait_s = 0.5 * 2 ** (len(child.crashes) - 1) if code else 0.0
        child.start_at = now + wait_s
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._say(f"{child.name} {how}; it is started again in {wait_s:.1f} s")
        self._write_event("killed" if code < 0 else "ended", process=child.name, how=how)

    def num_workers(self, queue: str) -> int:
        """Count the workers of a queue, including those loading or about to be restarted, without those that drain."""
        return len(self._active(queue))

    def _active(self, queue: str) -> list[Child]:
        found = [child for child in self._children if child.queue == queue and child.drained_at is None]
        return sorted(found, key=lambda child: child.replica)

    def scale(self, queue: str, number: int) -> None:
        """Start workers of a queue or begin to drain some, the newest first, so that `number` stay.

        A draining worker keeps its number, and so its GPUs, until it has ended: fewer may start than requested.
        """
        active = self._active(queue)
        for child in active[number:]:
            child.drained_at = time.monotonic()
            if child.process and child.process.poll() is None:
                child.process.send_signal(signal.SIGUSR2)
        taken = {child.replica for child in self._children if child.queue == queue}
        max_workers = worker_bounds(self._config)[queue][1]
        free = [replica for replica in range(max_workers) if replica not in taken]
        for replica in free[: max(0, number - len(active))]:
            child = self._worker(queue, replica, was_added=True)
            self._start(child)
            self._children.append(child)

    def _poll_draining(self) -> None:
        """Forget drained workers that have ended; send SIGTERM, then SIGKILL, to those that take too long."""
        for child in [child for child in self._children if child.drained_at is not None]:
            process, limit_s = child.process, self._config.autoscale.drain_s
            if process is None or process.poll() is not None:
                if process:
                    signal_group(process, signal.SIGKILL)  # killed itself, it leaves its prefork children
                self._children.remove(child)
                self._restarts[child.name] += child.num_restarts
                continue
            late_s = time.monotonic() - (child.drained_at or 0.0) - limit_s
            if late_s > self._config.lease.shutdown_grace_s + STOP_S:
                signal_group(process, signal.SIGKILL)
            elif late_s > 0 and not child.told_to_stop:
                child.told_to_stop = True
                process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Send SIGTERM to all, SIGKILL after STOP_S; to a trainer with heartbeats after TRAINER_STOP_S. Idempotent.

        A second Ctrl-C kills at once.
        """
        alive = [child.process for child in self._children if child.process and child.process.poll() is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        try:
            for process in alive:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, began + STOP_S - time.monotonic()))
            _kill(child.process for child in self._children if child is not self._trainer)
            while self._trainer.process in alive and self._trainer.process.poll() is None:
                if time.monotonic() > began + TRAINER_STOP_S or not self._trainer_is_alive():
                    break
                time.sleep(POLL_S)
        finally:
            _kill(child.process for child in self._children)

    @property
    def restarts(self) -> dict[str, int]:
        """Number of restarts by role, where any."""
        counts = self._restarts + Counter({child.name: child.num_restarts for child in self._children})
        return dict(counts)


def _kill(processes: Iterable[Process | None]) -> None:
    """Kill each with its group: a killed worker leaves its prefork children."""
    for process in processes:
        if process:
            signal_group(process, signal.SIGKILL)
            process.wait()


def _tail(log: Path, *, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
