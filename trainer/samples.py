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

from sluice.common.ledger.ledger import read_fields
from sluice.common.monitoring.metric_stream import write_samples
from sluice.common.pipeline import STAGES
from sluice.common.run import Run
from sluice.common.types import Group
from sluice.trainer.completions import CompletionsTable
from sluice.trainer.micro_batches import Sequences

SAMPLES_PER_STEP = 2
_WORK = [f"{fact}:{stage.name}" for stage in STAGES for fact in ("w", "n", "s")]
"""The worker of each stage, its claims, and how often it was sent again."""


class Samples:
    """The samples of one run."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client, self._run = client, run
        self._completions = CompletionsTable(Path(run.folder)) if run.config.metrics.completions else None

    def forget_after(self, step: int) -> None:
        """Remove the completions after this step, from which the run resumes."""
        if self._completions is not None:
            self._completions.forget_after(step)

    def keep(
        self,
        step: int,
        groups: list[Group],
        advantages: list[list[float]],
        logprobs_of: Callable[[Sequences], Sequence[NDArray[np.float32] | None]],
    ) -> None:
        """Write all completions of the step as a table where configured, and everything of its first groups.

        logprobs_of: the trainer's, before the step, of the completions that are kept.
        """
        if self._completions is not None:
            self._completions.write(step, groups, advantages)  # all of them, into the run folder
        kept = self._run.config.metrics.samples_kept
        if not kept:
            return
        chosen = list(zip(groups, advantages, strict=True))[:SAMPLES_PER_STEP]
        work = read_fields(self._client, self._run.keys, [group.group_id for group, _ in chosen], _WORK)
        trained = iter(
            logprobs_of([(group.prompt_ids, e.completion.token_ids) for group, _ in chosen for e in group.episodes])
        )
        samples = []
        for (group, values), done in zip(chosen, work, strict=True):
            stats = {name: value.decode() for name, value in zip(_WORK, done, strict=True) if value is not None}
            samples.append(_sample(step, group, values, trained) | {"work": stats})
        write_samples(self._client, self._run.keys, samples, kept=kept)


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
                "extra": episode.extra,
                "advantage": advantage,
                "finish_reason": episode.completion.finish_reason,
                "tokens": len(episode.completion.token_ids),
            }
            for episode, advantage in zip(group.episodes, advantages, strict=True)
        ],
    }
