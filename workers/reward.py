"""The `reward` queue: user code, in prefork children with a time limit. Never imports torch.

A reward that raises, never returns, allocates without bound or kills its process is an infrastructure failure: the group is
scored again, then dead-lettered. It never becomes a reward of 0. The parent reports a child that died.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, signals
from celery.utils.log import current_process_index

from sluice.common.ledger.ledger import Claim
from sluice.common.pipeline import stage_on
from sluice.common.serialization import decode, encode
from sluice.common.types import has_reward_variance
from sluice.workers.context import Context, Result
from sluice.workers.rewards.answers import evaluation_fields
from sluice.workers.rewards.scoring import LoadedReward, limit_memory, load_reward_functions, score_group

log = logging.getLogger("sluice.reward")

_KILL_AFTER_S = 2.0
"""A child that ignores its soft time limit is killed this much later."""
_MAX_CHILDREN = 1024
"""Of a reward worker; more than that share slots of SharedWorkerStats."""
_IDLE = -1.0


def prepare(app: Celery, role: str) -> Context:
    """Register the task of this queue. Raises ConfigError when a reward does not import."""
    context = Context.open(app, role)
    config = context.run.config.reward
    functions = load_reward_functions(config.functions, code_folder=context.run.config.code_folder)
    host = RewardRole(context, functions)
    app.task(
        host.score,
        name=stage_on(role).celery_task,
        soft_time_limit=config.time_limit_s,
        time_limit=config.time_limit_s + _KILL_AFTER_S,
    )
    signals.worker_ready.connect(lambda **_: context.start_heartbeat(), weak=False)
    signals.worker_process_init.connect(lambda **_: host.reopen(app, role), weak=False)
    signals.task_failure.connect(host.report_lost_child, weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return context


class SharedWorkerStats:
    """Stats of the children, in memory that they share with the parent, which sends the heartbeat.

    A child writes its own slot only: there is no lock that it could hold when it is killed.
    """

    def __init__(self) -> None:
        self._num_done = multiprocessing.RawArray("d", _MAX_CHILDREN)
        self._worked_s = multiprocessing.RawArray("d", _MAX_CHILDREN)
        self._since = multiprocessing.RawArray("d", _MAX_CHILDREN)  # 0: no child, _IDLE, or when its stage began

    def join(self) -> None:
        """Reset the slot in a new child; the previous child in it may have died at work."""
        self._since[self._slot] = _IDLE

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        slot, began = self._slot, time.monotonic()  # one clock for all processes of a machine
        self._since[slot] = began
        try:
            yield
        finally:
            self._since[slot] = _IDLE
            self._worked_s[slot] += time.monotonic() - began
            self._num_done[slot] += 1

    @property
    def _slot(self) -> int:
        return (current_process_index(0) or 0) % _MAX_CHILDREN

    @property
    def num_done(self) -> int:
        return int(sum(self._num_done))

    @property
    def num_running(self) -> int:
        return sum(since > 0 for since in self._since)

    @property
    def busy_s(self) -> float:
        """Seconds of work, mean over the children; a running stage counts up to now."""
        now, children = time.monotonic(), [since for since in self._since if since]
        return (sum(self._worked_s) + sum(now - since for since in children if since > 0)) / max(1, len(children))


class RewardRole:
    """The reward functions, loaded once, and the context of this process, parent or child."""

    def __init__(self, context: Context, functions: list[LoadedReward]) -> None:
        self.context = context
        self._functions = functions
        self._reported: deque[str] = deque(maxlen=1000)
        self._shared_stats = SharedWorkerStats()
        context.stats = lambda: {"done": self._shared_stats.num_done, "running": self._shared_stats.num_running}
        context.busy_s = lambda: self._shared_stats.busy_s

    def reopen(self, app: Celery, role: str) -> None:
        """Set up a new child: its own connections, its own name in claims, and its memory limit."""
        self.context = Context.open(app, role)
        self._shared_stats.join()
        limit_memory(self.context.run.config.reward.memory_limit_mib)
        with contextlib.suppress(OSError):  # where supported, the kernel kills this child before any other process
            Path("/proc/self/oom_score_adj").write_text("1000")

    def report_lost_child(self, *, exception: BaseException, task_id: str, args: Any, **_: Any) -> None:
        """Fail the stage of a child that was killed or killed itself, from the parent, now and not a lease later."""
        if not isinstance(exception, (WorkerLostError, TimeLimitExceeded)) or task_id in self._reported:
            return
        self._reported.append(task_id)  # Celery reports a hard time limit twice, and the child's death besides
        (group_id,), ledger, context = args, self.context.urgent, self.context
        what = _how_it_ended(exception)
        log.warning("group %s: %s", group_id, what)
        try:
            holder = ledger.holder(group_id, "reward")
            if not holder.startswith(context.process.rpartition(":")[0] + ":"):
                return  # it died before it claimed the stage, or the stage was reassigned
            claim = Claim(group_id=group_id, stage="reward", holder=holder, attempt=0, fields={})
            ledger.fail(claim, reason=type(exception).__name__, detail=what)
        except redis.RedisError as error:
            log.warning("group %s is scored again when its lease ends: %s", group_id, error)

    def score(self, group_id: str) -> None:
        """Score a group (Celery task)."""
        config = self.context.run.config
        lease_s = max(config.lease.running_s, config.reward.time_limit_s + 2 * _KILL_AFTER_S)
        with self._shared_stats.stage():
            self.context.run_stage(
                group_id, "reward", self._score, fields=("task", "rollout", "version", "eval"), lease_s=lease_s
            )

    def _score(self, claim: Claim) -> Result:
        task = decode(claim.fields["task"] or b"")
        completions = decode(claim.fields["rollout"] or b"")["completions"]
        scores = score_group(
            self._functions,
            aggregation=self.context.run.config.reward.aggregation,
            prompt=task["prompt"],
            completions=[c["text"] for c in completions],
            completion_ids=[c["token_ids"].tolist() for c in completions],
            target=task["target"],
            columns=task["columns"],
            trainer_state={
                "global_step": int(claim.fields["version"] or 0),
                "max_steps": self.context.run.config.trainer.num_steps,
            },
        )
        payload = scores.to_wire()
        if evaluation := claim.fields["eval"]:
            name = evaluation.decode().partition(".")[2]
            (dataset,) = (d for d in self.context.run.config.evaluation.datasets if d.name == name)
            payload |= evaluation_fields(completions, answer=dataset.answer)
        is_filtered = self.context.run.config.trainer.filter_zero_variance and not evaluation
        return Result(payload=encode(payload), is_zero_variance=is_filtered and not has_reward_variance(scores.reward))


def _how_it_ended(exception: BaseException) -> str:
    if isinstance(exception, TimeLimitExceeded):
        return "the scoring process gave no answer within its time limit and was killed"
    signal = re.search(r"signal (\d+)", str(exception))
    how = f"was killed by signal {signal[1]}" if signal else "exited"
    return f"the scoring process {how}: {exception}"
