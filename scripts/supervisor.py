"""`sluice run`'s process tree: starts every role, starts a dead one again, ends all of them in order.

    redis (embedded, if no URL is given) --> workers, one process per replica --> trainer
    a worker or trainer that exits is started again after 0.5, 1, 2, ... seconds; MAX_CRASHES within CRASH_WINDOW_S end the run
    while Redis is away nothing is started, and who died of that dies once
    exit 0 is no crash (somebody sent SIGTERM): the role is started again at once; of the trainer at its last step, it ends
    the run in good order; exit 2 (bad input) at the first start ends it with the reason
    Ctrl-C or SIGTERM: trainer and workers get SIGTERM; what still lives after STOP_S is killed

Children ask the kernel to be told when the supervisor dies, so even SIGKILL of the supervisor leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.config import QUEUES, Config
from scripts.processes import signal_group, spawn

STOP_S = 7.0
MAX_CRASHES = 5
CRASH_WINDOW_S = 60.0


class RunFailed(Exception):
    """A role cannot be kept alive; the message holds the tail of its log."""


@dataclass(kw_only=True)
class Child:
    """One supervised process."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    crashes: list[float] = field(default_factory=list)
    start_at: float = 0.0
    num_restarts: int = 0


class Supervisor:
    """Keeps the roles of one run alive until the trainer has finished."""

    def __init__(self, config: Config, *, run: str, url: str, folder: Path, status: Callable[[], str]) -> None:
        """`status` reads the run's; while Redis is away it raises its ConnectionError, and so does `poll` then."""
        self._status = status
        env = {"SLUICE_REDIS_URL": url, "SLUICE_RUN": run, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._children = [_worker(queue, i, env, folder) for queue, i in planned_workers(config)]
        trainer = [sys.executable, "-m", "trainer"]
        self._trainer = Child(name="trainer", argv=trainer, env=env, log=folder / "logs" / "trainer.log")
        self._children.append(self._trainer)

    def start(self) -> None:
        for child in self._children:
            child.process = spawn(child.argv, log=child.log, env=child.env)

    def poll(self) -> bool:
        """Reap and restart. True while the trainer has not finished. Raises RunFailed."""
        for child in self._children:
            code = child.process.poll() if child.process else None
            if code is None and child.process:
                continue
            status = (
                self._status()
            )  # while Redis is away no death is judged, and nothing is started that could not work
            if child is self._trainer and code == 0 and status == "finished":
                return False
            if child.process:
                self._after_exit(child, code or 0)
            if time.monotonic() >= child.start_at:
                child.process = spawn(child.argv, log=child.log, env=child.env)
                child.num_restarts += 1
        return True

    def _after_exit(self, child: Child, code: int) -> None:
        child.process = None
        if code == 2 and child.num_restarts == 0:  # a later one may have been refused for what is going on around it
            raise RunFailed(f"{child.name} refused its input:\n{_tail(child.log)}")
        if code == 0:
            return
        now = time.monotonic()
        child.crashes = [t for t in child.crashes if now - t < CRASH_WINDOW_S] + [now]
        if len(child.crashes) >= MAX_CRASHES:
            raise RunFailed(
                f"{child.name} died {len(child.crashes)} times within {CRASH_WINDOW_S:.0f} s (last exit code {code}); "
                f"its log {child.log} ends:\n{_tail(child.log)}"
            )
        child.start_at = now + 0.5 * 2 ** (len(child.crashes) - 1)

    def stop(self) -> None:
        """SIGTERM to all, SIGKILL to what is left after STOP_S. Idempotent."""
        alive = [child.process for child in self._children if child.process and child.process.poll() is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in alive:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        for child in self._children:
            if child.process:
                signal_group(child.process, signal.SIGKILL)  # prefork children of a worker that had to be killed
                child.process.wait()

    @property
    def restarts(self) -> dict[str, int]:
        """Roles that had to be started again."""
        return {child.name: child.num_restarts for child in self._children if child.num_restarts}


def planned_workers(config: Config) -> list[tuple[str, int]]:
    """(queue, replica) of every worker process that a run on this machine gets; `rollout,eval` is one queue here."""
    counts = {queue: getattr(config.replicas, queue) for queue in QUEUES}
    if not config.evaluation.datasets:
        counts["eval"] = 0
    elif counts["eval"] == 0:
        counts["rollout,eval"] = counts.pop("rollout")
    return [(queue, i) for queue, count in counts.items() for i in range(count)]


def _worker(queue: str, replica: int, env: dict[str, str], folder: Path) -> Child:
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", queue, "--loglevel", "INFO"]
    name = f"{queue.partition(',')[0]}-{replica}"
    return Child(name=name, argv=argv, env=env | _gpu(queue, replica), log=folder / "logs" / f"{name}.log")


def _gpu(queue: str, replica: int) -> dict[str, str]:
    """Where CUDA_VISIBLE_DEVICES lists several GPUs: one per rollout worker, the last for everything else."""
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if len(devices) < 2:
        return {}
    chosen = devices[replica % (len(devices) - 1)] if queue.startswith("rollout") else devices[-1]
    return {"CUDA_VISIBLE_DEVICES": chosen}


def _tail(log: Path, *, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
