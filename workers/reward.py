"""The `reward` queue: user code, in prefork children with a time limit. Never imports torch.

A reward that raises, sleeps for ever or kills its process is an infrastructure failure: the group is scored again, then
dead-lettered. It is never turned into a reward of 0.
"""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

from celery import Celery, signals

from common.ledger import Claim
from common.serialization import decode, encode
from workers.context import Context, Result
from workers.rewards.scoring import LoadedReward, load_reward_functions, score_group

log = logging.getLogger("sluice.reward")

_KILL_AFTER_S = 2.0
"""A child that ignores its soft time limit is killed this much later."""


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
    signals.worker_ready.connect(lambda **_: context.start_heart(), weak=False)
    signals.worker_process_init.connect(lambda **_: host.reopen(app, role), weak=False)
    signals.worker_shutdown.connect(lambda **_: context.close(), weak=False)
    return "prefork", config.concurrency


class RewardRole:
    """The reward functions, loaded once, and the context of whichever process this is."""

    def __init__(self, context: Context, functions: list[LoadedReward]) -> None:
        self.context = context
        self._functions = functions
        self._num_done = multiprocessing.Value("q", 0)  # shared with the children
        context.facts = lambda: {"done": self._num_done.value}

    def reopen(self, app: Celery, role: str) -> None:
        """In a fresh child: connections of its own, and its own name in claims."""
        self.context = Context.open(app, role)

    def score(self, group_id: str) -> None:
        """Task: the reward part of a group."""
        config = self.context.run.config
        lease_s = max(config.lease.running_s, config.reward.time_limit_s + 2 * _KILL_AFTER_S)
        self.context.perform(group_id, "reward", self._score, fields=("task", "rollout", "version"), lease_s=lease_s)
        with self._num_done.get_lock():
            self._num_done.value += 1

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
        return Result(payload=encode(scores.to_wire()))
