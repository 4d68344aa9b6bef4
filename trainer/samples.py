"""Groups that were trained, for people to read: `sluice samples`, the sample browser, `sluice trace`, and a table of all.

stream `samples`      the first groups of every step, the newest `metrics.samples_kept`
run folder            every completion, where `metrics.completions` is set (`trainer/completions.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import redis
from numpy.typing import NDArray

from sluice.common.connections.broker import STAGE_TASKS
from sluice.common.ledger.scripts import Scripts
from sluice.common.run import Run
from sluice.common.serialization import encode
from sluice.common.types import Group
from sluice.trainer.completions import CompletionsTable
from sluice.trainer.micro_batches import Sequences

SAMPLES_PER_STEP = 2
_WORK = [f"{fact}:{stage}" for stage in STAGE_TASKS for fact in ("w", "n", "s")]
"""Who did each part, its claims, and how often it was sent again."""


class Samples:
    """What is kept of the groups of one run."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client, self._run = client, run
        self._scripts = Scripts(client, run.keys)
        self._completions = CompletionsTable(Path(run.folder)) if run.config.metrics.completions else None

    def forget_after(self, step: int) -> None:
        """The run goes on from this step: completions of steps that will be trained again go."""
        if self._completions is not None:
            self._completions.forget_after(step)

    def keep(
        self,
        step: int,
        groups: list[Group],
        advantages: list[list[float]],
        logprobs_of: Callable[[Sequences], Sequence[NDArray[np.float32] | None]],
    ) -> None:
        """All completions of the step as a table where asked for, and of its first groups everything.

        logprobs_of: the trainer's, before the step, of the completions that are kept.
        """
        if self._completions is not None:
            self._completions.write(step, groups, advantages)  # all of them, into the run folder
        kept = self._run.config.metrics.samples_kept
        if not kept:
            return
        chosen = list(zip(groups, advantages, strict=True))[:SAMPLES_PER_STEP]
        with self._client.pipeline(transaction=False) as pipe:
            for group, _ in chosen:
                pipe.hmget(self._run.keys("g", group.group_id), _WORK)
            work = pipe.execute()
        trained = iter(
            logprobs_of([(group.prompt_ids, e.completion.token_ids) for group, _ in chosen for e in group.episodes])
        )
        with self._client.pipeline(transaction=False) as pipe:
            for (group, values), done in zip(chosen, work, strict=True):
                stats = {name: value.decode() for name, value in zip(_WORK, done, strict=True) if value is not None}
                sample = encode(_sample(step, group, values, trained) | {"work": stats})
                self._scripts("write_record", "XADD", "samples", "MAXLEN", kept, "*", "sample", sample, client=pipe)
            pipe.execute()


def _sample(
    step: int, group: Group, advantages: list[float], trained: Iterator[NDArray[np.float32] | None]
) -> dict[str, object]:
    return {
        "step": step,
        "group": group.group_id,
        "version": group.policy_version,
        "prompt": group.prompt,
        "target": group.target,
        "timestamps": group.timestamps,
        "completions": [
            {
                "text": episode.completion.text,
                "token_ids": episode.completion.token_ids,
                "rollout_logprobs": episode.completion.rollout_logprobs.astype(np.float32),
                "policy_logprobs": next(trained),
                "policy_versions": episode.completion.policy_versions,
                "reward": episode.reward,
                "rewards": episode.rewards,
                "advantage": advantage,
                "finish_reason": episode.completion.finish_reason,
                "tokens": len(episode.completion.token_ids),
            }
            for episode, advantage in zip(group.episodes, advantages, strict=True)
        ],
    }
