"""Config of how a run is operated: its processes on this machine, and the sinks of its metrics."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from sluice.common.config.trainer import Section


class ReplicaRange(Section):
    """Autoscaled: `sluice run` keeps between `min` and `max` processes, as many as the work asks for."""

    min: int
    """Processes that are always there, and that the run starts with."""
    max: int
    """Processes at most."""


def _as_replicas(value: object) -> object:
    """Check a count or a range here, so that an error names the key alone and not the branch of a union."""
    if isinstance(value, ReplicaRange):
        return value
    ends = list(value.values()) if isinstance(value, dict) and set(value) == {"min", "max"} else [value]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise ValueError(f"{value!r} is neither a count of processes nor {{min: 1, max: 4}}")
    if len(ends) == 1:
        return value
    made = ReplicaRange.model_validate(value)
    if made.min > made.max or made.max == 0:
        raise ValueError(f"min={made.min}, max={made.max}: max must be at least min, and at least 1")
    return made


Replicas = Annotated[int | ReplicaRange, BeforeValidator(_as_replicas)]


class ReplicasConfig(Section):
    """Processes that `sluice run` starts on this machine: workers per queue (a count, or `{min: 1, max: 4}`), trainer ranks."""

    dataset: Replicas = 1
    """Dataset workers (CPU). They watch the load of all queues: a range begins at 1."""
    rollout: Replicas = 1
    """Rollout workers (one per GPU). A range begins at 1: a run without one makes no progress at all."""
    reference: Replicas = 1
    """Reference workers; `sluice run` starts none while kl_beta is 0. With min 0 they are started when there is work."""
    reward: Replicas = 1
    """Reward workers (CPU). With min 0 they are started when there is work."""
    eval: Replicas = 1
    """Evaluation workers, none where no evaluation set is configured; 0 = the rollout workers evaluate with their engines;
    min 0 = a worker of their own, started when an evaluation is due."""
    trainer: int = Field(default=1, ge=1)
    """Ranks of the trainer, one per GPU."""

    @model_validator(mode="after")
    def _always_needed(self) -> ReplicasConfig:
        for queue in ("dataset", "rollout"):
            count = getattr(self, queue)
            if isinstance(count, ReplicaRange) and count.min == 0:
                raise ValueError(f"{queue}: min=0 would leave the run without a {queue} worker; use min: 1")
        return self

    def bounds(self, queue: str) -> tuple[int, int]:
        """(min, max) processes of a queue; equal where a count is given."""
        count: int | ReplicaRange = getattr(self, queue)
        return (count.min, count.max) if isinstance(count, ReplicaRange) else (count, count)


class AutoscaleConfig(Section):
    """How `replicas.<queue>: {min, max}` follows the load (docs/scaling.md has the formula)."""

    up_after_s: float = Field(default=5.0, gt=0)
    """Seconds over which load is averaged; before workers are added it must be high for as long, and as long after any change."""
    cooldown_s: float = Field(default=120.0, gt=0)
    """Seconds without need before workers are removed, and after any change; more than the time that a worker takes to load."""
    wait_s: float = Field(default=1.0, ge=0)
    """No workers are added while a stage spends less than this many seconds in queue and worker together."""
    busy_share: float = Field(default=0.5, ge=0, le=1)
    """No workers are added while the present ones are busy for less of their time: work then waits for something else, such as
    weights."""
    drain_s: float = Field(default=60.0, ge=0)
    """Seconds in which a worker that is removed may finish what it holds; then it returns the rest, as at SIGTERM."""


class DashboardConfig(Section):
    """The web page that `sluice run` starts beside the run, on 127.0.0.1 (docs/dashboard.md)."""

    enabled: bool = True
    """False = none; `sluice dashboard` shows any run at any time."""
    port: int = Field(default=8265, ge=0, le=65535)
    """Port; another free one is used where it is occupied. 0 = any."""


class MetricsConfig(Section):
    stream_length: int = Field(default=100_000, ge=1)
    """Trainer steps kept in the Redis metrics stream."""
    samples_kept: int = Field(default=1000, ge=0)
    """Trained groups kept for `sluice samples`."""
    completions: bool = False
    """Write every trained completion into the run folder: `completions/step-000012.parquet`, one file per step."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (extra `sluice-rl[tensorboard]`)."""
    wandb: bool = False
    """Also report to Weights & Biases (extra `sluice-rl[wandb]`); account, entity and mode come from its own variables."""
    trackio: bool = False
    """Also report to Trackio (extra `sluice-rl[trackio]`): in the run folder, or where TRACKIO_DIR or TRACKIO_SPACE_ID says."""
    project: str = Field(default="sluice", min_length=1)
    """Project of the run at Weights & Biases and Trackio."""
    remote_control: bool = False
    """Workers obey Celery's remote control, which Flower needs. Whoever may publish on the broker can then stop them."""
