"""What `sluice run` starts on this machine: which workers, with which command and on which GPUs.

Of several GPUs the rollout workers take all but the last in turn, the trainer's ranks the last ones, every other role the
very last. Where replicas gives a range, a worker's GPUs follow from its number alone: worker 3 gets the same ones whenever it
is started, and what is refused for want of GPUs is refused for the upper end of the range, before anything starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from sluice.common.config import QUEUES, Config
from sluice.common.errors import ConfigError
from sluice.common.policies.signing import RUN_KEY


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One process to start."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    "beside what all roles of the run get"


def planned_workers(config: Config, *, at_most: bool = False) -> list[tuple[str, int]]:
    """(queue, replica) of every worker process that a run on this machine begins with, or `at_most` may come to have.

    `rollout,eval` is one queue here.
    """
    return [(queue, i) for queue, ends in worker_bounds(config).items() for i in range(ends[at_most])]


def worker_bounds(config: Config) -> dict[str, tuple[int, int]]:
    """What `-Q` gets -> (min, max) processes on this machine."""
    bounds = {queue: config.replicas.bounds(queue) for queue in QUEUES}
    if not config.evaluation.datasets:
        bounds["eval"] = (0, 0)
    elif bounds["eval"] == (0, 0):
        bounds["rollout,eval"] = bounds.pop("rollout")
    return bounds


def worker_role(config: Config, queue: str, replica: int) -> Role:
    """The plain Celery command of docs/operations.md."""
    argv = [sys.executable, "-m", "celery", "-A", "sluice", "worker", "-Q", queue, "--loglevel", "INFO"]
    gpus = assigned_gpus(config, queue, replica)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return Role(name=f"{queue.partition(',')[0]}-{replica}", argv=argv, env=visible)


def trainer_role(config: Config) -> Role:
    """One process, or one that starts a rank per GPU."""
    num_ranks = config.replicas.trainer
    argv = [
        sys.executable,
        "-m",
        *(["sluice.trainer"] if num_ranks == 1 else ["sluice.scripts.launcher.ranks", str(num_ranks)]),
    ]
    env = {"RANK": "0", "WORLD_SIZE": "1"}  # a machine's own must not make it wait for ranks that nobody starts
    gpus = trainer_gpus(config)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return Role(name="trainer", argv=argv, env=env | visible)


def key_environment(role: Role, key_file: Path | None) -> dict[str, str]:
    """The run's key for a role that publishes or loads policies: that of the file, else what is in our own environment. For
    the others, which run code of users among them, none."""
    if role.name.partition("-")[0] not in ("trainer", "rollout", "eval", "reference"):
        return {RUN_KEY: "", f"{RUN_KEY}_FILE": ""}
    return {f"{RUN_KEY}_FILE": str(key_file)} if key_file else {}


def dashboard_role(port: int) -> Role:
    """The web page over the run, and the others on its Redis."""
    argv = [sys.executable, "-m", "sluice.scripts.cli", "dashboard", "--port", str(port)]
    return Role(name="dashboard", argv=argv)


def trainer_gpus(config: Config) -> list[str]:
    """The last ones, one per rank; empty = no choice is made."""
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
