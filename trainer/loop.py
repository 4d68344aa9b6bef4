"""The training loop: one step per batch of complete groups, one policy version per step.

    sample -> advantages -> micro-batches -> loss -> clip -> step -> publish (overlapped) -> metrics
           -> every few steps: checkpoint, then acknowledge

What it waits for: a full batch young enough to train on (woken by the script that stores the last group; the cause is
logged while it waits), the previous publication, room on a disk (`heartbeat.py`), and an operator who has paused the run.
What ends it: the last step, SIGTERM (finish the step, checkpoint, exit 0), a drain (full batches of what is in flight,
checkpoint, exit 0), a window in which every group was lost (checkpoint, exit 3), or an error (the supervisor restarts it, and
`recovery.py` says how it continues).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import redis
import torch

from sluice.common.config import Config
from sluice.common.connections.broker import make_app
from sluice.common.errors import OnlyLosing, StateLost
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import device_name
from sluice.common.monitoring.losses import forget_ends, read_losses
from sluice.common.policies.canary import choose_sequences, random_sequences
from sluice.common.policies.store import PolicyStore
from sluice.common.run import Run, RunRecord
from sluice.common.types import Group
from sluice.trainer.audit import StepRecord
from sluice.trainer.control_state import HELD_POLL_S, ControlReader
from sluice.trainer.distributed.parallel import open_policy
from sluice.trainer.distributed.ranks import Ranks
from sluice.trainer.evaluations import Evaluations
from sluice.trainer.heartbeat import TrainerHeartbeat
from sluice.trainer.publish import Publisher
from sluice.trainer.recovery import Position, Recovery
from sluice.trainer.samples import Samples
from sluice.trainer.step import train_on
from sluice.trainer.step_metrics import FlowMeter, Reporter, batch_metrics, log_step, token_age
from sluice.trainer.summary import write_summary

log = logging.getLogger("sluice.trainer")

EVALUATION_WAIT_S = 300.0
"""At the end, how long the trainer waits for evaluations still running."""


class Trainer:
    """One trainer process of one run."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self.client, self.run = client, run
        self.stopping, self.is_drained = False, False
        self.control_state = ControlReader(client, run)
        self.control_state.read()
        self.position = Position()
        self.reporter, self.samples = Reporter(client, run), Samples(client, run)
        self.heartbeat = TrainerHeartbeat(client, run, report=self.reporter.report_stall)
        incarnation = RunRecord(client, run.keys).begin_incarnation()
        retry = partial(self.heartbeat.retry_while_disk_full, lambda: self.stopping)
        self.buffer = ReplayBuffer(
            Ledger(client, run.keys, self.config),
            groups_per_step=self.config.groups_per_step,
            max_policy_age=self.config.replay_buffer.max_policy_age,
            max_resample_count=self.config.replay_buffer.max_resample_count,
        )
        store = PolicyStore(client, run.keys, self.config.policy_store)
        self.heartbeat.confirm = store.confirm
        self.publisher = Publisher(
            store, make_app(run.name), run, client, incarnation=incarnation, retry_while_disk_full=retry
        )
        self.evaluations = Evaluations(client, run, self.control_state, retry_while_disk_full=retry)
        self.recovery = Recovery(
            client, run, self.position, buffer=self.buffer, publisher=self.publisher, retry_while_disk_full=retry
        )

    @property
    def config(self) -> Config:
        """The config with the settings in force at the last `read`."""
        return self.control_state.config

    def train(self, ranks: Ranks) -> None:
        """Train from the present step to the last one, to SIGTERM, or to the end of a drain.

        ranks: those that train together; this process is rank 0.
        """
        self._begin(ranks)
        forget_ends(self.client, self.run.keys)  # how groups of an earlier trainer ended says nothing about this one
        flow = FlowMeter(self.client, self.run)
        started = time.monotonic() - self.position.wall_s
        while not self.stopping:
            self.control_state.read()
            if self.position.step >= self.config.trainer.num_steps:
                break
            began = time.monotonic()
            if (batch := self._next_batch()) is None:
                break
            groups, num_left = batch
            waited_s = time.monotonic() - began
            metrics = self._train_on(groups)
            step_s = time.monotonic() - began
            self.position.wall_s = time.monotonic() - started
            metrics |= {
                "time/wait_for_batch": waited_s,
                "time/step": step_s,
                "idle_fraction/trainer": waited_s / step_s,
                "throughput/trained_tokens_per_s": metrics["num_tokens"] / step_s,
                "buffer/groups": float(num_left),
                **flow.metrics(step_s=step_s),
                **self.evaluations.metrics(),
                **self.control_state.metrics(),
            }
            self.heartbeat.tell(idle_fraction=waited_s / step_s)
            self.reporter.report(self.position.step, self.position.version, metrics)
            log_step(self.position.step, self.config, metrics)
            is_due = self.position.step % self.config.checkpoint.every_steps == 0
            if is_due or self.evaluations.needs_checkpoint(self.position.step):
                self.recovery.save(self.policy)
        self._finish()
        self.policy.close()

    def _begin(self, ranks: Ranks) -> None:
        """Load and publish the policy of the newest checkpoint, or the base model's."""
        device = device_name(self.config.trainer.device)
        self.heartbeat.tell(idle_fraction=1.0, device=f"{ranks.size} x {device}" if ranks.size > 1 else device)
        end_token_ids = ModelAssets.from_wire(self.run.assets).eos_token_ids
        self.heartbeat.tell(doing="loading the model")
        self.policy = open_policy(self.config, end_token_ids=end_token_ids, ranks=ranks)
        self.buffer.vocab_size = self.policy.vocab_size
        parent = self.recovery.resume(self.policy, last_reported=self.reporter.last_version)
        if self._has_work(parent):
            self.heartbeat.tell(doing="publishing its policy")
            self._publish(parent=parent)
        else:
            self.heartbeat.tell(step=self.position.step, version=self.position.version)
            log.info("step %d is the last one, and its policy is evaluated: nothing is published", self.position.step)
        self.reporter.begin(self.position.step, self.config)
        self.samples.forget_after(self.position.step)
        self.publisher.wait()
        self.heartbeat.tell(doing="")

    def _has_work(self, parent: int) -> bool:
        """Return whether a policy equal to version `parent` has to be published: to be trained further, or evaluated."""
        is_last = 0 < self.config.trainer.num_steps <= self.position.step
        return not is_last or bool(
            self.evaluations.unreported or self.evaluations.missing(self.position.step, same_as=parent)
        )

    def _train_on(self, groups: list[Group]) -> dict[str, float]:
        """Make one optimizer step and publish its policy."""
        metrics = batch_metrics(groups, self.recovery.policy_ages(groups))
        metrics["staleness/token_mean"] = token_age(self.client, self.run.keys, groups, current=self.position.version)
        step_metrics, advantages = train_on(self.policy, groups, self.config, step=self.position.step + 1)
        self.position.step += 1
        began = time.monotonic()
        parent_digest = self._publish(parent=self.position.version, groups=groups)
        metrics |= step_metrics | {"time/publish_pause": time.monotonic() - began} | self.publisher.metrics()
        record = StepRecord(
            step=self.position.step,
            parent_digest=parent_digest,
            groups=groups,
            metrics=step_metrics,
            settings=self.control_state.state.settings,
        )
        self.recovery.record(record)
        self.samples.keep(self.position.step, groups, [a.tolist() for a in advantages], self.policy.logprobs_of)
        return metrics

    def _next_batch(self) -> tuple[list[Group], int] | None:
        """Return the groups of the next step, in the order of their cursors, and how many more are ready.

        None when told to stop while waiting, or drained.
        """
        self.heartbeat.waits()
        while not self.stopping:
            self.publisher.republish_full()
            if self.control_state.state.paused:
                time.sleep(HELD_POLL_S)
                self.control_state.read()
                continue
            self.buffer.max_policy_age = self.config.replay_buffer.max_policy_age
            try:
                sample = self.buffer.sample(
                    self.position.version, step=self.position.step + 1, published=self.publisher.published
                )
            except StateLost as lost:
                self.recovery.restore_redis_state(self.policy, lost)
                self._publish(parent=self.position.version)
                self.publisher.wait()
                continue
            if sample.groups is not None:
                self.heartbeat.moves()
                in_order = sorted(sample.groups, key=lambda group: int(group.group_id[1:]))
                return in_order, sample.available - len(in_order)
            # Drained: all untrained groups are ready, and fewer than a batch.
            is_drain = self.control_state.state.draining
            if is_drain and sample.available == self.buffer.num_untrained() < self.config.groups_per_step:
                self.is_drained = True
                return None
            self._end_if_only_losing()
            self.buffer.wait(1.0)
            self.control_state.read()
        return None

    def _end_if_only_losing(self) -> None:
        """Raise OnlyLosing when every group of a whole window was lost; the steps so far are durable then."""
        if verdict := read_losses(self.client, self.run).verdict(self.config):
            if self.position.step != self.position.saved_step:
                self.recovery.save(self.policy)
            raise OnlyLosing(verdict)

    def _publish(self, *, parent: int, groups: Sequence[Group] = ()) -> str:
        """Begin to publish the present weights under the next version; return the digest of the previous version.

        groups: those trained last, from which the canary is made.
        """
        self.position.version += 1
        self.heartbeat.tell(step=self.position.step, version=self.position.version)

        # The previous publication is complete before the snapshot is taken: at most two copies exist, this one and its base,
        # and a version is never announced whose parent does not exist.
        self.publisher.wait()
        digest_before = self.publisher.digest
        weights = self.policy.snapshot(getattr(torch, self.config.rollout.dtype), full=self.position.version == 0)

        # Training is deterministic: a step repeated after a crash may come out bit for bit the same, and what was sampled from
        # it then is no older.
        origin = self.recovery.matching_abandoned_version(weights, otherwise=parent)
        is_equal = origin != parent or not groups

        # Snapshot and canary are of the same weights, so both come before the next step changes them.
        canary = self.policy.score(choose_sequences(groups) or random_sequences(self.policy.vocab_size))
        evaluate = self.evaluations.begin(
            self.position.step, self.position.version, same_as=origin if is_equal else None
        )
        self.publisher.publish(
            self.position.version, weights, step=self.position.step, parent=origin, canary=canary, evaluate=evaluate
        )
        return digest_before

    def _finish(self) -> None:
        """Save the last step, free its groups, and wait for its evaluation."""
        if self.position.step != self.position.saved_step:  # written twice, it would forget which groups it covers
            self.recovery.save(self.policy)
        deadline = time.monotonic() + EVALUATION_WAIT_S
        while self.evaluations.unreported and not self.stopping and time.monotonic() < deadline:
            if metrics := self.evaluations.metrics():
                self.reporter.report(self.position.step, self.position.version, metrics)
            time.sleep(0.1)
        if self.evaluations.unreported and not self.stopping:
            late = sorted(self.evaluations.unreported)
            log.error("evaluations %s did not finish within %.0f s", late, EVALUATION_WAIT_S)
        self.evaluations.settle_best()  # results that came in while no trainer ran
        log.info("%s at step %d", self.outcome, self.position.step)

    @property
    def outcome(self) -> str:
        """Status of a run whose trainer has ended gracefully."""
        return "stopped" if self.stopping else "drained" if self.is_drained else "finished"

    def end(self, status: str, *, failure: str = "") -> None:
        """Write the summary of the run, then its status: who sees that a run has ended finds its summary."""
        wall_s = self.position.wall_s
        write_summary(self.client, self.run, status=status, failure=failure, wall_s=wall_s)
        RunRecord(self.client, self.run.keys).set_status(status, failure=failure)
        log.info("the run has ended; its summary is %s", Path(self.run.folder) / "summary.json")

    def close(self) -> None:
        """Close publisher, heartbeat and trackers, in this order."""
        self.publisher.close()
        self.heartbeat.close()
        self.reporter.close()
