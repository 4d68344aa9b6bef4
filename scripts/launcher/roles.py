"""What `sluice run` starts on this machine: which workers, with which command and on which GPUs.

Of several GPUs the rollout workers take all but the last in turn, the trainer's ranks the last ones, every other role the
very last. Where replicas gives a range, a worker's GPUs follow from its number alone: worker 3 always gets the same ones, and
a lack of GPUs is reported for the upper end of the range, before anything starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.pipeline import QUEUES, stage_on
from sluice.common.policies.signing import RUN_KEY

PYTHON = [sys.executable, "-P"]
"""The interpreter of every role: `-P` keeps the current folder, which may hold a `redis.py`, off the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One process to start."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    "added to the environment of all roles of the run"
    is_forked: bool = False
    "it may be forked from a process that has imported torch; a role that must not load torch may not"
    pass_fds: tuple[int, ...] = ()
    "file descriptors that it inherits"


def planned_workers(config: Config, *, at_most: bool = False) -> list[tuple[str, int]]:
    """Return (queue, replica) of every worker that a run on this machine starts with, or with `at_most` may ever have.

    `rollout,eval` is one queue here.
    """
    return [(queue, i) for queue, ends in worker_bounds(config).items() for i in range(ends[at_most])]


def worker_bounds(config: Config) -> dict[str, tuple[int, int]]:
    """Return the argument of `-Q` -> (min, max) processes on this machine."""
    bounds = {queue: config.replicas.bounds(queue) if stage_on(queue).is_needed(config) else (0, 0) for queue in QUEUES}
    if not config.evaluation.datasets:
        bounds["eval"] = (0, 0)
    elif bounds["eval"] == (0, 0):
        bounds["rollout,eval"] = bounds.pop("rollout")
    return bounds


def worker_role(config: Config, queue: str, replica: int) -> Role:
    """Make what `celery -A sluice worker -Q QUEUE` starts (docs/operations.md)."""
    argv = [*PYTHON, "-m", "sluice.workers", "-Q", queue, "--loglevel", "INFO"]
    env = _visible(assigned_gpus(config, queue, replica))
    return Role(name=f"{queue.partition(',')[0]}-{replica}", argv=argv, env=env, is_forked=queue != "reward")


def trainer_role(config: Config) -> Role:
    """Make the trainer's role: one process, or one that starts a rank per GPU."""
    env = {"RANK": "0", "WORLD_SIZE": "1"}  # the machine's own would make it wait for ranks that no process starts
    env |= _visible(trainer_gpus(config))
    return Role(name="trainer", argv=trainer_command(config.replicas.trainer), env=env, is_forked=True)


def _visible(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}


def trainer_command(num_ranks: int) -> list[str]:
    """Return the command line of `sluice train --ranks N`."""
    module = ["sluice.trainer"] if num_ranks == 1 else ["sluice.scripts.launcher.ranks", str(num_ranks)]
    return [*PYTHON, "-m", *module]


def key_environment(role: Role, key_file: Path | None) -> dict[str, str]:
    """Return the run's key for a role that publishes or loads policies: that of the file, else our own environment's. The other
    roles, which may run user code, get none."""
    name = role.name.partition("-")[0]
    if name != "trainer" and not (name in QUEUES and stage_on(name).needs_weights):
        return {RUN_KEY: "", f"{RUN_KEY}_FILE": ""}
    return {f"{RUN_KEY}_FILE": str(key_file)} if key_file else {}


def dashboard_role(*, listening: int, port: int, token: str) -> Role:
    """Make the role of the web page over the run, and the others on its Redis, on a socket that listens already."""
    argv = [*PYTHON, "-m", "sluice.scripts.cli", "dashboard", "--port", str(port), "--listening", str(listening)]
    return Role(name="dashboard", argv=argv, env={"SLUICE_DASHBOARD_TOKEN": token}, pass_fds=(listening,))


def trainer_gpus(config: Config) -> list[str]:
    """Return the last GPUs, one per rank; empty = no choice is made."""
    is_free = config.trainer.device in ("auto", "cuda")  # cuda:N names one among all of them
    return _gpus()[-config.replicas.trainer :] if is_free else []


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
    workers = planned_workers(config, at_most=True)
    engines = [assigned_gpus(config, *worker) or gpus for worker in workers if stage_on(worker[0]).name == "rollout"]
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
    """Return the GPUs of a worker: of several, one rollout engine after the other takes all but the trainer's, the last
    `replicas.trainer`; other roles take the very last. Empty = no choice is made."""
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
    """Return what CUDA_VISIBLE_DEVICES lists; where it is not set, every NVIDIA GPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu]
    return [str(i) for i in range(_num_gpus())]


@cache
def _num_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
