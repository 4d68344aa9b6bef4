"""Recorded steps computed again from a run folder alone: no Redis, no workers, one process.

    base model or checkpoint --> step by step over the records --> losses and weights next to the recorded ones

A record holds the groups in order, so the same program on the same kind of machine repeats every sum of floats: on a CPU,
with as many threads, the weights are the same bit for bit. For a run with several ranks, or on another device, the loss
agrees to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sluice.common.config import Config
from sluice.common.config.file import read_run_config
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.operations.control import with_settings
from sluice.common.policies.digest import weights_digest
from sluice.trainer.audit import audit_folder, read_record, recorded_steps
from sluice.trainer.checkpoint import checkpoint_at, checkpoint_steps, go_on_from
from sluice.trainer.distributed.parallel import ParallelPolicy, open_policy
from sluice.trainer.step import train_on

TOLERANCE = 1e-6
"""Bound on the difference of two losses of one step, absolute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedStep:
    """One step, as recorded and as computed again."""

    step: int
    recorded_loss: float
    replayed_loss: float
    recorded_grad_norm: float
    replayed_grad_norm: float
    began_with_same_weights: bool
    "bit for bit, in the sampling precision"
    ended_with_same_weights: bool | None
    "bit for bit, in float32; none where no checkpoint of this step is kept"

    @property
    def agrees(self) -> bool:
        """The loss is the recorded one to 1e-6."""
        return abs(self.recorded_loss - self.replayed_loss) <= TOLERANCE


def replay(run_folder: Path, *, step: int | None = None) -> Iterator[ReplayedStep]:
    """Replay a step from the nearest checkpoint before it (steps between are replayed and yielded too); without a step, all
    from the base model where every step is recorded, else each recorded step that has its checkpoint.

    Raises ConfigError when a record that is needed is missing.
    """
    config = read_run_config(run_folder)
    stretches = _stretches(audit_folder(run_folder), run_folder / "checkpoints", step)
    end_token_ids = read_assets(config.model.path, revision=config.model.revision).eos_token_ids
    policy = open_policy(config, end_token_ids=end_token_ids)
    for start, last in stretches:
        if start:
            go_on_from(checkpoint_at(run_folder / "checkpoints", start), policy)
        for number in range(start + 1, last + 1):
            yield _replay_step(policy, config, run_folder, step=number)


def _stretches(records: Path, checkpoints: Path, step: int | None) -> list[tuple[int, int]]:
    """Return (step of the checkpoint to begin with, or 0 for the base model; last step) pairs, ascending."""
    recorded, saved = recorded_steps(records), [0, *checkpoint_steps(checkpoints)]
    known = ", ".join(map(str, recorded)) or "none"
    if step is None:
        if recorded and recorded == list(range(1, len(recorded) + 1)):
            return [(0, len(recorded))]
        if found := [(number - 1, number) for number in recorded if number - 1 in saved]:
            return found
        raise ConfigError(f"{records}: no recorded step has its checkpoint any more (recorded steps: {known})")
    read_record(records, step)  # says what is recorded, before anything is loaded
    start = max(number for number in saved if number < step)
    if missing := set(range(start + 1, step + 1)) - set(recorded):
        begins = f"the checkpoint of step {start}" if start else "the base model"
        raise ConfigError(
            f"step {step} is replayed from {begins}, but step {min(missing)} is not recorded (recorded steps: {known}): "
            "run with audit=all"
        )
    return [(start, step)]


def _replay_step(policy: ParallelPolicy, config: Config, run_folder: Path, *, step: int) -> ReplayedStep:
    record = read_record(audit_folder(run_folder), step)
    config = with_settings(config, record.settings)
    dtype = getattr(torch, config.rollout.dtype)
    began_with = {weights_digest(policy.snapshot(dtype, full=full)) for full in {False, step == 1}}  # 1: on version 0
    metrics, _ = train_on(policy, record.groups, config, step=step)
    ended_same = None
    if step in checkpoint_steps(run_folder / "checkpoints"):
        kept = checkpoint_at(run_folder / "checkpoints", step)
        ended_same = weights_digest(policy.snapshot(torch.float32)) == weights_digest(kept.weights)
    loss = lambda of: of["loss/policy"] + config.trainer.loss.kl_beta * of["loss/kl"]  # noqa: E731
    return ReplayedStep(
        step=step,
        recorded_loss=loss(record.metrics),
        replayed_loss=loss(metrics),
        recorded_grad_norm=record.metrics["grad_norm"],
        replayed_grad_norm=metrics["grad_norm"],
        began_with_same_weights=record.parent_digest in began_with,
        ended_with_same_weights=ended_same,
    )
