"""The training loop: one step per batch of whole groups, one policy version per step.

    sample -> advantages -> micro-batches -> loss -> clip -> step -> publish (overlapped) -> metrics
           -> every few steps: checkpoint, then acknowledge

What it waits for: a whole batch young enough to train on (woken by the script that files the last group; the cause is
logged while it waits), the publication before the one it starts, and an operator who has paused the run. What ends it: the
last step, SIGTERM (finish the step, checkpoint, exit 0), a drain (whole batches of what is in flight, checkpoint, exit 0), or
an error (the supervisor starts it again from the newest checkpoint).

A batch is freed only after a durable checkpoint names its step. After a crash the manifests in Redis give the same
groups for the same steps again, and training goes on under a new version whose parent is the checkpoint's. A version that
comes out bit for bit as one of the abandoned branch is entered as its child, at a distance of no step: the groups that one
made are as young as they were.

Should Redis come back with an older state (its last second is not durable), this process and its checkpoints know better:
what they have trained is settled by name, and the policy is published again under a new version.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.common.config import Config
from sluice.common.connections.broker import make_app
from sluice.common.errors import ConfigError, DiskFull, PolicyNotFound, StateLost
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import device_name
from sluice.common.policies.canary import choose_sequences, mismatch_bound, random_sequences
from sluice.common.policies.digest import weights_digest
from sluice.common.policies.lineage import abandoned_versions, policy_ages
from sluice.common.policies.store import PolicyStore
from sluice.common.run import Run, process_name
from sluice.common.types import Group
from sluice.trainer.audit import Audit, StepRecord
from sluice.trainer.best import settle_best, update_best
from sluice.trainer.checkpoint import (
    TrainerState,
    checkpoint_steps,
    go_on_from,
    newest_checkpoint,
    random_state,
    save_checkpoint,
)
from sluice.trainer.control_state import HELD_POLL_S, ControlReader
from sluice.trainer.distributed.parallel import open_policy
from sluice.trainer.distributed.ranks import Ranks
from sluice.trainer.heartbeat import TrainerHeartbeat
from sluice.trainer.publish import Publisher
from sluice.trainer.report import Reporter, batch_metrics, flow_metrics, log_step, token_age
from sluice.trainer.step import train_on

log = logging.getLogger("sluice.trainer")

EVALUATION_WAIT_S = 300.0
"""At the end, how long the trainer waits for evaluations still running."""
DISK_RETRY_S = 3.0
"""While a disk is full, how often the trainer tries again."""
RECENT_GROUPS_S = 120.0
"""How long a trained group is remembered by name: well over the seconds that a restarted Redis may have lost."""


class Trainer:
    """One trainer process of one run."""

    def __init__(self, client: redis.Redis, run: Run, *, ranks: Ranks | None = None) -> None:
        """ranks: those that train together; this process is the first of them, by default the only one."""
        self.client, self.run = client, run
        self.control_state = ControlReader(client, run)
        self.control_state.read()
        self.ranks = ranks or Ranks()
        self.folder = Path(run.folder)
        self.checkpoints = self.folder / "checkpoints"
        self.stopping, self.is_drained = False, False
        self.incarnation = int(client.hincrby(run.keys("run"), "incarnation", 1))
        self.store = PolicyStore(client, run.keys, self.config.policy_store)
        self.ledger = Ledger(client, run.keys, self.config)
        buffer = self.config.replay_buffer
        self.buffer = ReplayBuffer(
            self.ledger,
            groups_per_step=self.config.groups_per_step,
            max_policy_age=buffer.max_policy_age,
            max_resample_count=buffer.max_resample_count,
        )
        self.publisher = Publisher(
            self.store,
            make_app(run.name),
            run,
            client,
            incarnation=self.incarnation,
            retry_while_disk_full=self._retry_while_disk_full,
        )
        self.reporter = Reporter(client, run)
        self.audit = Audit(self.folder, self.config)
        self.sampling_dtype = getattr(torch, self.config.rollout.dtype)
        self.step, self.saved_step, self.version, self.available, self.wall_s = 0, 0, 0, 0, 0.0
        self.generated_tokens = float(client.hget(run.keys("totals"), "generated_tokens") or 0)
        self.trained_groups: list[str] = []
        self._recent_groups: deque[tuple[float, str]] = deque()
        self._abandoned: dict[int, dict[str, int]] = {}
        self._canary_bound = mismatch_bound(self.config.rollout.dtype, self.config.trainer.autocast)
        self._canary_sequences: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self.evaluating: set[tuple[str, int]] = set()
        self.idle_fraction = 1.0
        self.device = device_name(self.config.trainer.device)
        self.heartbeat = TrainerHeartbeat(run, client, process=process_name("trainer"), stats=self._stats)
        self.heartbeat.report = lambda cause, waited_s: self.reporter.report_stall(self.step, cause, waited_s)

    @property
    def config(self) -> Config:
        """With the settings in force at the last look."""
        return self.control_state.config

    def _stats(self) -> dict[str, object]:
        device = f"{self.ranks.size} x {self.device}" if self.ranks.size > 1 else self.device
        return {"step": self.step, "version": self.version, "idle_fraction": self.idle_fraction, "device": device}

    def train(self) -> None:
        """From wherever the run is to its last step, or to SIGTERM, or to the end of a drain."""
        assets = ModelAssets.from_wire(self.run.assets)
        self.policy = open_policy(self.config, end_token_ids=assets.eos_token_ids, ranks=self.ranks)
        self.buffer.vocab_size = self.policy.vocab_size
        self._resume_or_begin()
        started = time.monotonic() - self.wall_s
        while not self.stopping:
            self.control_state.read()
            if self.step >= self.config.trainer.num_steps:
                break
            began = time.monotonic()
            if (groups := self._next_batch()) is None:
                break
            waited = time.monotonic() - began
            metrics = self._train_on(groups)
            self.wall_s = time.monotonic() - started
            metrics["time/wait_for_batch"] = waited
            metrics["time/step"] = time.monotonic() - began
            metrics["idle_fraction/trainer"] = self.idle_fraction = waited / metrics["time/step"]
            metrics["throughput/trained_tokens_per_s"] = metrics["num_tokens"] / metrics["time/step"]
            metrics |= self._flow(metrics["time/step"]) | self._finished_evaluations() | self.control_state.metrics()
            self.reporter.report(self.step, self.version, metrics)
            log_step(self.step, self.config.trainer.num_steps, metrics, canary_bound=self._canary_bound)
            if self.step % self.config.checkpoint.every_steps == 0 or self._may_become_best():
                self.checkpoint()
        self._finish()
        self.policy.close()

    def _train_on(self, groups: list[Group]) -> dict[str, float]:
        """One optimizer step and the publication of its policy."""
        metrics = batch_metrics(groups, self._ages_of(groups))
        metrics["staleness/token_mean"] = token_age(self.client, self.run.keys, groups, current=self.version)
        step_metrics, advantages = train_on(self.policy, groups, self.config, step=self.step + 1)
        metrics |= step_metrics
        self.step += 1
        self._record_recent([group.group_id for group in groups])
        self._canary_sequences = choose_sequences(groups)
        began = time.monotonic()
        parent_digest = self._publish(parent=self.version)
        metrics["time/publish_pause"] = time.monotonic() - began
        metrics |= self.publisher.metrics()
        settings = self.control_state.control_state.settings
        record = StepRecord(
            step=self.step, parent_digest=parent_digest, groups=groups, metrics=step_metrics, settings=settings
        )
        self.audit.record(record, saved_step=self.saved_step)
        self.reporter.keep_samples(self.step, groups, [a.tolist() for a in advantages], self.policy.logprobs_of)
        return metrics

    def _ages_of(self, groups: list[Group]) -> list[int]:
        versions = [group.policy_version for group in groups]
        try:
            return policy_ages(self.client, self.run.keys, versions, current=self.version)
        except PolicyNotFound:
            # Redis came back older since the batch was taken; the next `sample` notices that, and settles it
            self.store.announce_again(incarnation=self.incarnation)
            return policy_ages(self.client, self.run.keys, versions, current=self.version)

    def _next_batch(self) -> list[Group] | None:
        """The groups of the next step, in the order of their cursors; None when told to stop while waiting, or drained."""
        self.heartbeat.waits()
        while not self.stopping:
            self.publisher.republish_full()
            if self.control_state.control_state.paused:
                time.sleep(HELD_POLL_S)
                self.control_state.read()
                continue
            self.buffer.max_policy_age = self.config.replay_buffer.max_policy_age
            try:
                sample = self.buffer.sample(self.version, step=self.step + 1, published=self.publisher.published)
            except StateLost as lost:
                self._restore_redis_state(lost)
                continue
            if sample.groups is not None:
                self.available = sample.available - len(sample.groups)
                self.heartbeat.moves()
                return sorted(sample.groups, key=lambda group: int(group.group_id[1:]))
            if self.control_state.control_state.draining and self._nothing_is_left(sample.available):
                self.is_drained = True
                return None
            self.buffer.wait(1.0)
            self.control_state.read()
        return None

    def _nothing_is_left(self, available: int) -> bool:
        """Whether no whole batch can come any more: what is not trained is ready, and fewer groups than a batch."""
        return available == self.buffer.num_untrained() < self.config.groups_per_step

    def _publish(self, *, parent: int) -> str:
        """Begin to publish the present weights under the next version; returns the digest of the version before it."""
        self.version += 1
        evaluate = self.config.evaluation.datasets if self._is_evaluated() else ()
        self.publisher.wait()  # before the snapshot, so that there are two copies at most: this one and its base
        digest_before = self.publisher.digest
        weights = self.policy.snapshot(self.sampling_dtype, full=self.version == 0)
        parent = self._matching_abandoned_version(weights, otherwise=parent)
        canary = self.policy.score(self._canary_sequences or random_sequences(self.policy.vocab_size))
        self.publisher.publish(self.version, weights, step=self.step, parent=parent, canary=canary, evaluate=evaluate)
        self.evaluating |= {(dataset.name, self.version) for dataset in evaluate}
        return digest_before

    def _is_evaluated(self) -> bool:
        every = self.config.evaluation.every_steps
        return self.step in (0, self.config.trainer.num_steps) or (every > 0 and self.step % every == 0)

    def _may_become_best(self) -> bool:
        return self.config.checkpoint.keep_best is not None and self._is_evaluated()

    def _matching_abandoned_version(self, weights: dict[str, Tensor], *, otherwise: int) -> int:
        """The version of the abandoned branch at this step that is bit for bit the same policy, if there is one."""
        versions = self._abandoned.get(self.step)
        if not versions:
            return otherwise
        return versions.get(weights_digest(weights), otherwise)

    def checkpoint(self) -> None:
        """Make this step durable, then free its groups."""
        self.publisher.wait()  # a checkpoint never names a version that does not exist
        state = TrainerState(
            step=self.step,
            version=self.version,
            cursor=int(self.client.get(self.run.keys("cursor")) or 0),
            random_state=random_state(),
            trained_groups=self.trained_groups,
            recent_groups=[group for _, group in self._recent_groups],
            wall_s=self.wall_s,
            base_digest=self.policy.base_digest,
        )

        def save() -> None:
            save_checkpoint(
                self.checkpoints,
                state,
                write=self.policy.save,
                keep=self.config.checkpoint.keep,
                protected=update_best(self.checkpoints, self.client, self.run),
            )

        self._retry_while_disk_full(save)
        self.saved_step = self.step
        self.audit.keep_only_replayable(checkpoint_steps(self.checkpoints))
        self.trained_groups = []
        self.buffer.acknowledge(self.step, trained=list(dict.fromkeys(state.trained_groups + state.recent_groups)))

    def _record_recent(self, group_ids: list[str]) -> None:
        now = time.monotonic()
        self.trained_groups += group_ids
        self._recent_groups += [(now, group_id) for group_id in group_ids]
        while self._recent_groups and self._recent_groups[0][0] < now - RECENT_GROUPS_S:
            self._recent_groups.popleft()

    def _retry_while_disk_full(self, write: Callable[[], None]) -> None:
        """Do what writes a file; while the disk is full training pauses. Raises DiskFull when told to stop meanwhile."""
        while True:
            try:
                write()
            except DiskFull as error:
                self.heartbeat.raise_alarm(f"training pauses: {error}")
                if self.stopping:
                    raise
                time.sleep(DISK_RETRY_S)
            else:
                self.heartbeat.clear_alarm()
                return

    def _resume_or_begin(self) -> None:
        """From the newest checkpoint, under a new version; or from the base model, which is version 0."""
        self.evaluating = evaluation.unreported(self.client, self.run)  # of an earlier process
        newest = self.store.latest_version()
        if newest >= 0:  # the store may be a memory file system: the reference role needs the base version back
            self.store.restore(0, self.policy.snapshot(self.sampling_dtype, full=True))
        found = newest_checkpoint(self.checkpoints)
        if found is None:
            self.buffer.roll_back(0)
            self.version = newest  # -1 on a fresh run: the base model becomes version 0, and 0 has no parent
            self._publish(parent=min(newest, 0))
        else:
            go_on_from(found, self.policy)
            self.step, self.version, self.wall_s = found.state.step, found.state.version, found.state.wall_s
            self.saved_step = self.step
            self._record_recent([*found.state.recent_groups, *found.state.trained_groups])
            self.trained_groups = []
            self.client.set(self.run.keys("cursor"), found.state.cursor, nx=True)
            self.buffer.acknowledge(self.step, trained=[group for _, group in self._recent_groups])
            if lost := self.buffer.roll_back(self.step):
                log.error("%d groups were trained after step %d and are lost: dropped(rolled_back)", lost, self.step)
            log.info("resumed at step %d from %s", self.step, found.path)
            self._abandoned = abandoned_versions(self.client, self.run.keys, after_step=self.step)
            parent, self.version = self.version, max(newest, self.version, self.reporter.last_version)
            self._publish(parent=parent)
        self.audit.forget_after(self.step)
        self.reporter.begin(self.step, self.config)
        self.publisher.wait()

    def _restore_redis_state(self, lost: StateLost) -> None:
        """Redis came back with an older state: settle what was trained, and publish under a version of its own."""
        keys = self.run.keys
        if not self.client.hexists(keys("run"), "config"):
            raise ConfigError(
                f"Redis has lost run {self.run.name}: was it restarted without its append-only file? Its groups and its "
                f"record are gone. `sluice export {self.folder} TARGET` saves the policy of the newest checkpoint; "
                "start a new run with model.path=TARGET"
            )
        log.error("%s; settling %d groups by name", lost, len(self._recent_groups))
        self.publisher.wait()
        self.store.announce_again(incarnation=self.incarnation)
        if self.step > self.saved_step:
            self.checkpoint()
        else:
            self.buffer.acknowledge(self.step, trained=[group for _, group in self._recent_groups])
        self._publish(parent=self.version)
        self.publisher.wait()

    def _flow(self, step_s: float) -> dict[str, float]:
        """Queues, buffer and ledger now, and what was generated since the last step."""
        metrics = flow_metrics(self.client, self.run, generated_before=self.generated_tokens)
        generated = metrics.pop("num_generated_tokens")
        self.generated_tokens += generated
        return {
            **metrics,
            "buffer/groups": float(self.available),
            "throughput/generated_tokens_per_s": generated / step_s,
        }

    def _finished_evaluations(self) -> dict[str, float]:
        """Metrics of evaluations that finished since the last step, the oldest of each set: one line holds one version."""
        metrics: dict[str, float] = {}
        sets = {dataset.name: dataset for dataset in self.config.evaluation.datasets}
        for name, version in sorted(self.evaluating):
            if f"eval/{name}/version" in metrics:
                continue
            found = evaluation.result(self.client, self.run.keys, sets[name], version=version)
            if found is None:
                continue
            self.evaluating.discard((name, version))
            metrics[f"eval/{name}/version"] = float(version)
            metrics |= {f"eval/{name}/{metric}": value for metric, value in found.metrics().items()}
            log.info("evaluation of version %d on %s: pass@1 %.3f", version, name, found.scores["pass@1"])
        if metrics:
            self._settle_best()
        return metrics

    def _settle_best(self) -> None:
        self._retry_while_disk_full(lambda: settle_best(self.checkpoints, self.client, self.run))

    def _finish(self) -> None:
        """The last step is saved, its groups are freed, and its evaluation is awaited."""
        if self.step != self.saved_step:  # a checkpoint written twice would forget which groups it covers
            self.checkpoint()
        deadline = time.monotonic() + EVALUATION_WAIT_S
        while self.evaluating and not self.stopping and time.monotonic() < deadline:
            if metrics := self._finished_evaluations():
                self.reporter.report(self.step, self.version, metrics)
            time.sleep(0.1)
        if self.evaluating and not self.stopping:
            log.error("evaluations %s did not finish within %.0f s", sorted(self.evaluating), EVALUATION_WAIT_S)
        self._settle_best()  # results that came in while no trainer lived
        log.info("%s at step %d", self.outcome, self.step)

    @property
    def outcome(self) -> str:
        """Status of a run whose trainer has ended in good order."""
        return "stopped" if self.stopping else "drained" if self.is_drained else "finished"

    def close(self) -> None:
        """In order: publisher, sinks, heartbeat."""
        self.publisher.close()
        self.heartbeat.close()
        self.reporter.close()
