"""`sluice run`'s process tree: starts every role, starts a dead one again, ends all of them in order.

    redis (embedded, if no URL is given) --> workers, one process per replica --> trainer
    a worker or trainer that exits is started again after 0.5, 1, 2, ... seconds; MAX_CRASHES within CRASH_WINDOW_S end the run
    while Redis is away nothing is started, and who died of that dies once
    exit 0 is no crash (somebody sent SIGTERM): the role is started again at once; of the trainer at its last step, or of a
    drain, it ends the run in good order; exit 2 (bad input) at the first start ends it with the reason, exit 3 (diverged)
    ends it always
    Ctrl-C or SIGTERM: trainer and workers get SIGTERM; what still lives after STOP_S is killed, but for a trainer that
    beats: it may be writing a checkpoint, and has TRAINER_STOP_S

Children ask the kernel to be told when the supervisor dies, so even SIGKILL of the supervisor leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from common.config import QUEUES, Config
from common.errors import ConfigError, Diverged
from scripts.processes import signal_group, spawn

STOP_S = 7.0
TRAINER_STOP_S = 120.0
MAX_CRASHES = 5
CRASH_WINDOW_S = 60.0


POLL_S = 0.2
"""How often a trainer that ends is looked at."""


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

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        url: str,
        folder: Path,
        status: Callable[[], str],
        trainer_beats: Callable[[], bool],
    ) -> None:
        """`status` reads the run's; while Redis is away it raises its ConnectionError, and so does `poll` then.

        `trainer_beats`: whether a heartbeat of the trainer came in the last seconds; false while Redis is away.
        """
        self._status, self._trainer_beats = status, trainer_beats
        env = {"SLUICE_REDIS_URL": url, "SLUICE_RUN": run, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._children = [_worker(queue, i, env, folder, config=config) for queue, i in planned_workers(config)]
        self._trainer = _trainer(env, folder, config=config)
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
            if child is self._trainer and code == 0 and status in ("finished", "drained"):
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
        if code == Diverged.EXIT_CODE and child is self._trainer:
            raise RunFailed(f"training has diverged:\n{_tail(child.log)}")
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
        """SIGTERM to all, SIGKILL to what is left after STOP_S; to a trainer that beats after TRAINER_STOP_S. Idempotent.

        Interrupted itself (a second Ctrl-C) it kills at once.
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
                if time.monotonic() > began + TRAINER_STOP_S or not self._trainer_beats():
                    break
                time.sleep(POLL_S)
        finally:
            _kill(child.process for child in self._children)

    @property
    def restarts(self) -> dict[str, int]:
        """Roles that had to be started again."""
        return {child.name: child.num_restarts for child in self._children if child.num_restarts}


def _kill(processes: Iterable[subprocess.Popen[bytes] | None]) -> None:
    """Each with its group: a worker that had to be killed leaves its prefork children."""
    for process in processes:
        if process:
            signal_group(process, signal.SIGKILL)
            process.wait()


def planned_workers(config: Config) -> list[tuple[str, int]]:
    """(queue, replica) of every worker process that a run on this machine gets; `rollout,eval` is one queue here."""
    counts = {queue: getattr(config.replicas, queue) for queue in QUEUES}
    if not config.evaluation.datasets:
        counts["eval"] = 0
    elif counts["eval"] == 0:
        counts["rollout,eval"] = counts.pop("rollout")
    return [(queue, i) for queue, count in counts.items() for i in range(count)]


def _worker(queue: str, replica: int, env: dict[str, str], folder: Path, *, config: Config) -> Child:
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", queue, "--loglevel", "INFO"]
    name = f"{queue.partition(',')[0]}-{replica}"
    gpus = assigned_gpus(config, queue, replica)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return Child(name=name, argv=argv, env=env | visible, log=folder / "logs" / f"{name}.log")


def _trainer(env: dict[str, str], folder: Path, *, config: Config) -> Child:
    num_ranks = config.replicas.trainer
    argv = [sys.executable, "-m", *(["trainer"] if num_ranks == 1 else ["scripts.ranks", str(num_ranks)])]
    env = env | {"RANK": "0", "WORLD_SIZE": "1"}  # a machine's own must not make it wait for ranks that nobody starts
    gpus = _gpus()[-num_ranks:]
    is_free = config.trainer.device in ("auto", "cuda")  # cuda:N names one among all of them
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus and is_free else {}
    return Child(name="trainer", argv=argv, env=env | visible, log=folder / "logs" / "trainer.log")


def check_gpus(config: Config) -> None:
    """Refuse ranks and vLLM engines that do not fit on this machine's GPUs, before anything starts. Raises ConfigError."""
    gpus, num_ranks = _gpus(), config.replicas.trainer
    if num_ranks > max(1, len(gpus)) and gpus and config.trainer.device != "cpu":
        raise ConfigError(
            f"replicas.trainer={num_ranks}: a rank needs a GPU of its own, and there are {len(gpus)}; lower it"
        )
    if config.rollout.engine != "vllm" or not gpus:
        return
    size, share = _gpus_per_engine(config), config.rollout.gpu_memory_utilization
    num_free = max(len(gpus) - num_ranks, 1)  # the last ones of several are the trainer's
    if size > num_free:
        raise ConfigError(
            f"rollout.tensor_parallel_size={size}: {len(gpus)} GPUs leave {num_free} for rollout workers (the last "
            f"{num_ranks} of several for all else); lower it, or start the roles one by one"
        )
    workers = planned_workers(config)
    engines = [
        assigned_gpus(config, *worker) or gpus for worker in workers if worker[0].startswith(("rollout", "eval"))
    ]
    for gpu in gpus:
        count = sum(gpu in engine for engine in engines)
        is_trainers = gpu in gpus[-num_ranks:] and len(gpus) > 1
        if count * share > 1 or (count and is_trainers and share > 0.5):
            raise ConfigError(
                f"GPU {gpu} would hold {count} vLLM engines at rollout.gpu_memory_utilization={share:g}"
                f"{' beside the trainer' if gpu in gpus[-num_ranks:] else ''}: set replicas.rollout={num_free // size} "
                "replicas.eval=0 (the rollout workers then evaluate), or lower rollout.gpu_memory_utilization"
            )


def assigned_gpus(config: Config, queue: str, replica: int) -> list[str]:
    """Of several GPUs: those of one rollout engine after the other, but for the last `replicas.trainer`, which are the
    trainer's; the very last for everything else. Empty = no choice is made."""
    gpus, size = _gpus(), _gpus_per_engine(config)
    if len(gpus) < 2:
        return []
    if not queue.startswith("rollout"):
        return gpus[-1:]
    first = replica % max(1, (len(gpus) - config.replicas.trainer) // size) * size
    return gpus[first : first + size]


def _gpus_per_engine(config: Config) -> int:
    return config.rollout.tensor_parallel_size if config.rollout.engine == "vllm" else 1


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists; where it is not set, every NVIDIA GPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu]
    return [str(i) for i in range(_num_gpus())]


@cache
def _num_gpus() -> int:
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in told.splitlines())


def _tail(log: Path, *, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
