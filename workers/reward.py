"""The `reward` queue: user code, in prefork children with a time limit. Never imports torch.

A reward that raises, sleeps for ever, allocates without end or kills its process is an infrastructure failure: the group
is scored again, then dead-lettered. It is never turned into a reward of 0. A child that died cannot say so: its parent does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import resource
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery, signals
from celery.utils.log import current_process_index

from sluice.common.connections.broker import send_stage
from sluice.common.ledger.ledger import Claim
from sluice.common.serialization import decode, encode
from sluice.common.types import has_reward_variance
from sluice.workers.context import Context, Result
from sluice.workers.rewards.answers import evaluation_facts
from sluice.workers.rewards.scoring import LoadedReward, load_reward_functions, score_group

log = logging.getLogger("sluice.reward")

_KILL_AFTER_S = 2.0
"""A child that ignores its soft time limit is killed this much later."""
_MAX_CHILDREN = 1024
"""Of a reward worker; more than that share places in the tally."""
_IDLE = -1.0


def prepare(app: Celery, role: str) -> tuple[Any, int]:
    """Register the task of this queue; returns pool and concurrency. Raises ConfigError when a reward does not import."""
    context = Context.open(app, role)
    config = context.run.config.reward
    host = RewardRole(context, load_reward_functions(config.functions))
    app.task(
        host.score,
        name="reward.score",
        soft_time_limit=config.time_limit_s,
        time_limit=config.time_limit_s + _KILL_AFTER_S,
    )
    signals.worker_ready.connect(lambda **_: context.start_heartbeat(), weak=False)
    signals.worker_process_init.connect(lambda **_: host.reopen(app, role), weak=False)
    signals.task_failure.connect(host.report_lost_child, weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return "prefork", config.concurrency


class SharedWorkerStats:
    """What the children do, in memory that they share with the parent, which tells of it.

    A child writes its own place only: there is no lock that one could take with it when it is killed.
    """

    def __init__(self) -> None:
        self._num_done = multiprocessing.RawArray("d", _MAX_CHILDREN)
        self._worked_s = multiprocessing.RawArray("d", _MAX_CHILDREN)
        self._since = multiprocessing.RawArray("d", _MAX_CHILDREN)  # 0: no child, _IDLE, or when its part began

    def join(self) -> None:
        """In a fresh child; the one before it in this place may have died at work."""
        self._since[self._place] = _IDLE

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        place, began = self._place, time.monotonic()  # one clock for all processes of a machine
        self._since[place] = began
        try:
            yield
        finally:
            self._since[place] = _IDLE
            self._worked_s[place] += time.monotonic() - began
            self._num_done[place] += 1

    @property
    def _place(self) -> int:
        return (current_process_index(0) or 0) % _MAX_CHILDREN

    @property
    def num_done(self) -> int:
        return int(sum(self._num_done))

    @property
    def num_running(self) -> int:
        return sum(since > 0 for since in self._since)

    @property
    def busy_s(self) -> float:
        """Seconds of work, in the mean of the children; a part that is not done counts up to now."""
        now, children = time.monotonic(), [since for since in self._since if since]
        return (sum(self._worked_s) + sum(now - since for since in children if since > 0)) / max(1, len(children))


class RewardRole:
    """The reward functions, loaded once, and the context of whichever process this is."""

    def __init__(self, context: Context, functions: list[LoadedReward]) -> None:
        self.context = context
        self._functions = functions
        self._reported: deque[str] = deque(maxlen=1000)
        self._shared_stats = SharedWorkerStats()
        context.stats = lambda: {"done": self._shared_stats.num_done, "running": self._shared_stats.num_running}
        context.busy_s = lambda: self._shared_stats.busy_s

    def reopen(self, app: Celery, role: str) -> None:
        """In a fresh child: connections of its own, its own name in claims, and less memory than the machine has."""
        self.context = Context.open(app, role)
        self._shared_stats.join()
        limit_mib = self.context.run.config.reward.memory_limit_mib
        if limit_mib is not None:
            _, most = resource.getrlimit(resource.RLIMIT_DATA)
            limit = limit_mib << 20
            if most == resource.RLIM_INFINITY or limit < most:  # else the machine's own bound is the tighter one
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with contextlib.suppress(OSError):  # where the kernel has it: it kills this child before anything else
            Path("/proc/self/oom_score_adj").write_text("1000")

    def report_lost_child(self, *, exception: BaseException, task_id: str, args: Any, **_: Any) -> None:
        """In the parent, when a child was killed or killed itself: what it held has failed, now and not a lease later."""
        if not isinstance(exception, (WorkerLostError, TimeLimitExceeded)) or task_id in self._reported:
            return
        self._reported.append(task_id)  # Celery tells of a hard time limit twice, and of the child's death besides
        (group_id,), ledger, context = args, self.context.urgent, self.context
        what = _how_it_ended(exception)
        log.warning("group %s: %s", group_id, what)
        try:
            holder = (ledger.client.hget(ledger.keys("g", group_id), "by:reward") or b"").decode()
            if not holder.startswith(context.process.rpartition(":")[0] + ":"):
                return  # it died before it claimed the part, or the part was taken over
            claim = Claim(group_id=group_id, stage="reward", holder=holder, attempt=0, fields={})
            if ledger.fail(claim, reason=type(exception).__name__, detail=what):
                send_stage(context.app, group_id, "reward")
        except redis.RedisError as error:
            log.warning("group %s is scored again when its lease ends: %s", group_id, error)

    def score(self, group_id: str) -> None:
        """Task: the reward part of a group."""
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
            trainer_state={"global_step": int(claim.fields["version"] or 0)},
        )
        payload = scores.to_wire()
        if evaluation := claim.fields["eval"]:
            name = evaluation.decode().partition(".")[2]
            (dataset,) = (d for d in self.context.run.config.evaluation.datasets if d.name == name)
            payload |= evaluation_facts(completions, answer=dataset.answer)
        is_filtered = self.context.run.config.trainer.filter_zero_variance and not evaluation
        return Result(payload=encode(payload), is_zero_variance=is_filtered and not has_reward_variance(scores.reward))


def _how_it_ended(exception: BaseException) -> str:
    if isinstance(exception, TimeLimitExceeded):
        return "the scoring process gave no answer within its time limit and was killed"
    signal = re.search(r"signal (\d+)", str(exception))
    how = f"was killed by signal {signal[1]}" if signal else "ended by itself"
    return f"the scoring process {how}: {exception}"
