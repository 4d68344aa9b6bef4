"""Config of how a run is operated: its processes on this machine, and the sinks of its metrics."""

from __future__ import annotations

from pydantic import Field

from common.config_trainer import Section


class ReplicasConfig(Section):
    """Processes that `sluice run` starts on this machine: workers per queue, and ranks of the trainer."""

    dataset: int = Field(default=1, ge=0)
    """Dataset workers (CPU)."""
    rollout: int = Field(default=1, ge=0)
    """Rollout workers (one per GPU)."""
    reference: int = Field(default=1, ge=0)
    """Reference workers; they idle when kl_beta is 0."""
    reward: int = Field(default=1, ge=0)
    """Reward workers (CPU)."""
    eval: int = Field(default=1, ge=0)
    """Evaluation workers, none where no evaluation set is configured; 0 = the rollout workers evaluate with their engines."""
    trainer: int = Field(default=1, ge=1)
    """Ranks of the trainer, one per GPU."""


class MetricsConfig(Section):
    stream_length: int = Field(default=100_000, ge=1)
    """Trainer steps kept in the Redis metrics stream."""
    samples_kept: int = Field(default=1000, ge=0)
    """Trained groups kept for `sluice samples`."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (extra `sluice[tensorboard]`)."""
