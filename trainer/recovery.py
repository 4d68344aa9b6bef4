"""What survives a crash of the trainer, or of Redis: checkpoints, and the names of the groups that were trained.

    the trainer died       newest checkpoint --> groups trained after it are sampled again, from manifests in Redis
                           --> published under a new version whose parent is the checkpoint's
    Redis came back older  groups trained recently are settled by name --> published under a new version

A batch is freed only after a durable checkpoint names its step. A version that is bit for bit one of the abandoned branch
is entered as its child, at a distance of no step: the groups sampled from that one do not age.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
import torch
from torch import Tensor

from sluice.common.errors import ConfigError, PolicyError, PolicyNotFound, StateLost
from sluice.common.ledger.evaluations import evaluated, named, pending
from sluice.common.ledger.ledger import read_cursor, restore_cursor
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.metric_stream import write_event
from sluice.common.policies.digest import weights_digest
from sluice.common.policies.lineage import abandoned_versions, equal_versions, policy_ages, read_lineage
from sluice.common.run import Run, RunRecord
from sluice.common.types import Group
from sluice.trainer.audit import Audit, StepRecord
from sluice.trainer.best import update_best
from sluice.trainer.checkpoint import (
    TrainerState,
    checkpoint_steps,
    go_on_from,
    newest_checkpoint,
    random_state,
    save_checkpoint,
)
from sluice.trainer.distributed.parallel import ParallelPolicy
from sluice.trainer.heartbeat import DiskRetry
from sluice.trainer.publish import Publisher

log = logging.getLogger("sluice.trainer")

RECENT_GROUPS_S = 120.0
"""How long a trained group is remembered by name: well over what a restarted Redis may have lost."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where training is."""

    step: int = 0
    "batches trained on"
    version: int = 0
    "policy version of the weights; -1 before the base model is published"
    saved_step: int = 0
    "of the newest checkpoint"
    wall_s: float = 0.0
    "seconds of training so far, all incarnations"


class Recovery:
    """Checkpoints of one run, and how to resume from them."""

    def __init__(
        self,
        client: redis.Redis,
        run: Run,
        position: Position,
        *,
        buffer: ReplayBuffer,
        publisher: Publisher,
        retry_while_disk_full: DiskRetry,
    ) -> None:
        self._client, self._run, self._position = client, run, position
        self._buffer, self._publisher = buffer, publisher
        self._retry_while_disk_full = retry_while_disk_full
        self._checkpoints = Path(run.folder) / "checkpoints"
        self._audit = Audit(Path(run.folder), run.config)
        self._trained_groups: list[str] = []
        self._recent: deque[tuple[float, str]] = deque()
        self._abandoned: dict[int, dict[str, int]] = {}

    def record(self, record: StepRecord) -> None:
        """Remember the groups of a trained step by name, and keep them for `sluice replay` as `audit` says."""
        self._record_recent([group.group_id for group in record.groups])
        self._audit.record(record, saved_step=self._position.saved_step)

    def save(self, policy: ParallelPolicy) -> None:
        """Make this step durable, then free its groups. Raises DiskFull when told to stop while there is no room."""
        self._publisher.wait()  # a checkpoint never names a version that does not exist
        position = self._position
        state = TrainerState(
            step=position.step,
            version=position.version,
            cursor=read_cursor(self._client, self._run.keys),
            random_state=random_state(),
            trained_groups=self._trained_groups,
            recent_groups=self._recent_groups,
            wall_s=position.wall_s,
            base_digest=policy.base_digest,
        )

        keep = self._run.config.checkpoint.keep
        protected = lambda: update_best(self._checkpoints, self._client, self._run)  # noqa: E731
        self._retry_while_disk_full(
            lambda: save_checkpoint(self._checkpoints, state, write=policy.save, keep=keep, protected=protected())
        )
        position.saved_step = position.step
        self._audit.keep_only_replayable(checkpoint_steps(self._checkpoints))
        self._trained_groups = []
        trained = list(dict.fromkeys(state.trained_groups + state.recent_groups))
        self._buffer.acknowledge(position.step, trained=trained)
        self._trim_lineage()
        write_event(self._client, self._run.keys, "checkpoint")

    def _trim_lineage(self) -> None:
        """Forget versions that are too old for any group, seen from each of the newest checkpoints; those that were evaluated or
        have a checkpoint stay. The base model is a checkpoint too: where no other loads, a run resumes from it."""
        steps = [0, *checkpoint_steps(self._checkpoints)]
        oldest = steps[-self._run.config.checkpoint.keep :][0] - self._buffer.max_policy_age
        lineage = read_lineage(self._client, self._run.keys)
        old = {version for version, made in lineage.items() if made.step < oldest and made.step not in steps}
        self._publisher.store.forget(old - evaluated(self._client, self._run, old))

    def resume(self, policy: ParallelPolicy, *, last_reported: int) -> int:
        """Resume from the newest checkpoint, or begin with the base model. Returns the parent of the version to publish next.

        last_reported: newest version that an earlier process has reported; Redis may have lost it.
        """
        position = self._position
        newest = self._publisher.store.latest_version()
        if newest >= 0:  # the store may be a memory file system: the reference role needs the base version back
            sampling_dtype = getattr(torch, self._run.config.rollout.dtype)
            self._publisher.store.restore(0, policy.snapshot(sampling_dtype, full=True))
        found = newest_checkpoint(self._checkpoints)
        if found is None:
            # Batches sampled so far have their manifests, and are trained again from the base model on.
            self._buffer.roll_back(0)
            position.version = newest  # -1 on a fresh run: the base model becomes version 0, and 0 has no parent
            parent = min(newest, 0)
        else:
            # What the checkpoint names is settled before what came after it is dropped: no group is counted twice.
            go_on_from(found, policy)
            position.step = position.saved_step = found.state.step
            position.wall_s = found.state.wall_s
            self._record_recent([*found.state.recent_groups, *found.state.trained_groups])
            self._trained_groups = []
            restore_cursor(self._client, self._run.keys, found.state.cursor)
            self._buffer.acknowledge(position.step, trained=self._recent_groups)
            if lost := self._buffer.roll_back(position.step):
                log.error("%d groups trained after step %d are lost: dropped(rolled_back)", lost, position.step)
            log.info("resumed at step %d from %s", position.step, found.path)

            # The weights are those of the checkpoint's version, under a number that no process has ever used.
            parent, position.version = found.state.version, max(newest, found.state.version, last_reported)
            self._restore_evaluated(parent, policy)
        self._abandoned = abandoned_versions(self._client, self._run.keys, after_step=position.step)
        self._audit.forget_after(position.step)
        return parent

    def _restore_evaluated(self, version: int, policy: ParallelPolicy) -> None:
        """Write the policy of the checkpoint again where its evaluation is not finished and its bytes are lost: a policy is
        evaluated once."""
        unfinished = {number for _, number in map(named, pending(self._client, self._run.keys))}
        if not unfinished:
            return
        for equal in equal_versions(read_lineage(self._client, self._run.keys), version):
            if equal in unfinished:
                weights = policy.snapshot(getattr(torch, self._run.config.rollout.dtype), full=equal == 0)
                try:
                    self._publisher.store.restore(equal, weights)
                except PolicyError as error:
                    log.warning("the evaluation of policy version %d may not finish: %s", equal, error)

    def restore_redis_state(self, policy: ParallelPolicy, lost: StateLost) -> None:
        """Settle what was trained after Redis came back with an older state. The caller then publishes the policy again.

        Raises ConfigError where Redis has lost the run.
        """
        if not RunRecord(self._client, self._run.keys).config:
            raise ConfigError(
                f"Redis has lost run {self._run.name}: was it restarted without its append-only file? Its groups and its "
                f"record are gone. `sluice export {self._run.folder} TARGET` saves the policy of the newest checkpoint; "
                "start a new run with model.path=TARGET"
            )
        log.error("%s; settling %d groups by name", lost, len(self._recent))
        self._publisher.wait()
        self._publisher.announce_again()
        if self._position.step > self._position.saved_step:
            self.save(policy)
        else:
            self._buffer.acknowledge(self._position.step, trained=self._recent_groups)

    def policy_ages(self, groups: Sequence[Group]) -> list[int]:
        """Return the ages of the policies that sampled these groups, in optimizer steps."""
        versions = [group.policy_version for group in groups]
        try:
            return policy_ages(self._client, self._run.keys, versions, current=self._position.version)
        except PolicyNotFound:
            # Redis came back older since the batch was sampled; the next `sample` notices that, and settles it
            self._publisher.announce_again()
            return policy_ages(self._client, self._run.keys, versions, current=self._position.version)

    def matching_abandoned_version(self, weights: dict[str, Tensor], *, otherwise: int) -> int:
        """Return the version of the abandoned branch at this step that is bit for bit the same policy, else `otherwise`."""
        versions = self._abandoned.get(self._position.step)
        return versions.get(weights_digest(weights), otherwise) if versions else otherwise

    def _record_recent(self, group_ids: list[str]) -> None:
        now = time.monotonic()
        self._trained_groups += group_ids
        self._recent += [(now, group_id) for group_id in group_ids]
        while self._recent and self._recent[0][0] < now - RECENT_GROUPS_S:
            self._recent.popleft()

    @property
    def _recent_groups(self) -> list[str]:
        return [group_id for _, group_id in self._recent]
