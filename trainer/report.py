"""What a trainer step says of itself: metrics to Redis, JSONL and trackers; samples and completions for people to read.

The glossary with formulas is in docs/algorithms.md.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from sluice.common.config import QUEUES, Config
from sluice.common.connections.broker import STAGE_TASKS
from sluice.common.errors import PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger.evaluations import mark_reported
from sluice.common.ledger.ledger import read_counters
from sluice.common.ledger.scripts import Scripts
from sluice.common.monitoring.diagnosis import Cause
from sluice.common.monitoring.metrics import last_metrics, read_heartbeats, write_metrics
from sluice.common.monitoring.queues import read_queues
from sluice.common.policies.lineage import policy_ages
from sluice.common.run import Run
from sluice.common.serialization import encode
from sluice.common.types import Group, has_reward_variance
from sluice.trainer.completions import CompletionsTable
from sluice.trainer.micro_batches import Sequences
from sluice.trainer.trackers import TrackedRun, Trackers, check_packages, tracked_id

log = logging.getLogger("sluice.trainer")

SAMPLES_PER_STEP = 2
_REPORTED = re.compile(rb'\{"step": (\d+), "version": (\d+)')
"""Beginning of the line of a step."""
_WORK = [f"{fact}:{stage}" for stage in STAGE_TASKS for fact in ("w", "n", "s")]
"""Who did each part, its claims, and how often it was sent again."""


class Reporter:
    """Writes one line per step to every sink. Trackers, and the files of completions, begin with `begin`."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client = client
        self._scripts = Scripts(client, run.keys)
        self._run = run
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._last_step, self.last_version = _last_logged(self._path)
        "newest policy version that earlier processes have reported; -1 when there was none"
        check_packages(run.config.metrics)
        self._trackers: Trackers | None = None
        self._completions = CompletionsTable(folder) if run.config.metrics.completions else None

    def begin(self, step: int, config: Config) -> None:
        """The run goes on from this step, under this config: what was kept of steps that will be trained again goes."""
        created_at = self._client.hget(self._run.keys("run"), "created_at") or b""
        tracked = TrackedRun(
            name=self._run.name,
            run_id=tracked_id(self._run.name, created_at.decode()),
            project=config.metrics.project,
            folder=Path(self._run.folder),
            config=config.model_dump(mode="json"),
            resumed_step=step,
            told_step=self._last_step,
        )
        self._trackers = Trackers(config.metrics, tracked)
        if self._completions is not None:
            self._completions.forget_after(step)

    def report(self, step: int, version: int, metrics: dict[str, float]) -> None:
        """One trainer step. Evaluations whose results are in it are marked last: killed before, the next trainer tells them."""
        metrics = metrics | (self._trackers.metrics() if self._trackers else {})
        line = {"step": step, "version": version, "time": time.time(), **metrics}
        write_metrics(self._client, self._run.keys, line, max_length=self._run.config.metrics.stream_length)
        append_line(self._path, {name: value for name, value in line.items() if math.isfinite(value)})
        if self._trackers is not None:
            self._trackers.log(step, metrics)
        for dataset in self._run.config.evaluation.datasets:
            if (evaluated := metrics.get(f"eval/{dataset.name}/version")) is not None:
                mark_reported(self._client, self._run.keys, dataset=dataset.name, version=int(evaluated))

    def report_stall(self, step: int, cause: Cause, waited_s: float) -> None:
        """A line of metrics.jsonl while the trainer does not move: for how long, and why. Needs no Redis."""
        append_line(
            self._path,
            {"step": step, "time": time.time(), "stall": cause.kind, "cause": cause.text, "waited_s": waited_s},
        )

    def keep_samples(
        self,
        step: int,
        groups: list[Group],
        advantages: list[list[float]],
        logprobs_of: Callable[[Sequences], Sequence[NDArray[np.float32] | None]],
    ) -> None:
        """The first groups of the step, for `sluice samples`, the sample browser and `sluice trace`.

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

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()


def log_step(step: int, num_steps: int, metrics: Mapping[str, float], *, canary_bound: float) -> None:
    """One line for the log; an error where a sampler scores the canary otherwise than the trainer."""
    shown = [
        metrics[name] for name in ("reward/mean", "loss/policy", "grad_norm", "staleness/mean", "time/wait_for_batch")
    ]
    log.info("step %d/%d reward %.3f loss %.4f grad_norm %.2f age %.2f waited %.2f s", step, num_steps, *shown)
    if metrics.get("off_policy/canary_abs_diff", 0.0) > canary_bound:
        log.error(
            "a sampler's logprobs are %.3g nats from the trainer's on the canary (bound %g): see `sluice status`",
            metrics["off_policy/canary_abs_diff"],
            canary_bound,
        )


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One line of JSON, whole or not at all: a full disk costs lines of this file, never the run."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        log.error("%s was not written to: %s", path, error)
        with suppress(OSError):
            os.truncate(path, size)


def _last_logged(path: Path) -> tuple[int, int]:
    """Highest step and newest version of all steps that were reported, or (-1, -1)."""
    step = version = -1
    if path.exists():
        with path.open("rb") as file:
            for found in filter(None, map(_REPORTED.match, file)):
                step, version = max(step, int(found[1])), max(version, int(found[2]))
    return step, version


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


def batch_metrics(groups: list[Group], ages: list[int]) -> dict[str, float]:
    """Rewards, lengths and ages of one batch."""
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [e.reward for e in episodes if e.reward is not None]
    lengths = [len(e.completion.token_ids) for e in episodes]
    metrics = {
        "reward/mean": fmean(rewards) if rewards else math.nan,
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "frac_reward_zero_std": fmean(not has_reward_variance(e.reward for e in g.episodes) for g in groups),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(e.completion.finish_reason == "length" for e in episodes),
        "staleness/mean": fmean(ages),
        "staleness/max": max(ages),
        "staleness/in_queue": fmean(_seconds_in_queue(group) for group in groups),
        "num_episodes": len(episodes),
        "num_tokens": sum(lengths),
    }
    for name in episodes[0].rewards:
        scores = [s for e in episodes if (s := e.rewards[name]) is not None]
        metrics[f"reward/{name}/mean"] = fmean(scores) if scores else math.nan
    for age, count in Counter(ages).items():
        metrics[f"policy_age/{age}"] = count
    return metrics


def token_age(client: redis.Redis, keys: Keys, groups: list[Group], *, current: int) -> float:
    """Mean over tokens of the age of the policy that produced each; nan where Redis has forgotten one of their versions."""
    tokens: Counter[int] = Counter()
    for group in groups:
        for episode in group.episodes:
            for version, count in episode.completion.policy_versions:
                tokens[version] += count
    try:
        ages = policy_ages(client, keys, list(tokens), current=current)
    except PolicyNotFound:
        return math.nan
    return sum(age * count for age, count in zip(ages, tokens.values(), strict=True)) / max(1, tokens.total())


def _seconds_in_queue(group: Group) -> float:
    """From ready to taken."""
    return group.timestamps.get("leased", 0.0) - group.timestamps.get("ready", 0.0)


def flow_metrics(client: redis.Redis, run: Run, *, generated_before: float) -> dict[str, float]:
    """Buffer, queues, ledger and how busy the workers are."""
    with client.pipeline(transaction=False) as pipe:
        pipe.get(run.keys("bytes"))
        pipe.scard(run.keys("credit"))
        pipe.hget(run.keys("totals"), "generated_tokens")
        held, credits, generated = pipe.execute()
    counters = read_counters(client, run.keys)
    metrics: dict[str, float] = {}
    for name, queue in read_queues(client, run, QUEUES).items():
        metrics |= {f"queue/{name}/depth": float(queue.depth), f"queue/{name}/oldest_age_s": queue.oldest_age_s}
    shares: dict[str, list[float]] = defaultdict(list)
    heartbeats = read_heartbeats(client, run.keys).values()
    for stats in heartbeats:
        if "idle_fraction" in stats and stats["role"] != "trainer":
            shares[stats["role"]].append(stats["idle_fraction"])
    compared = [stats.get(key) for stats in heartbeats for key in ("mismatch", "cache_mismatch")]
    if differences := [difference for difference in compared if difference is not None]:
        metrics["off_policy/canary_abs_diff"] = max(differences)
    if adapter_shares := [stats["adapter_share"][0] for stats in heartbeats if stats.get("adapter_share")]:
        metrics["off_policy/adapter_share"] = min(adapter_shares)
    metrics |= {f"idle_fraction/{role}": fmean(values) for role, values in shares.items()}
    if run.config.trainer.filter_zero_variance:
        dropped, before = (
            counters.dropped.get("zero_variance", 0),
            last_metrics(client, run.keys).get("filter/dropped", 0.0),
        )
        metrics["filter/dropped"] = float(dropped)
        metrics["filter/dropped_in_step"] = dropped - before
        metrics["filter/kept_for_bound"] = float(counters.kept_for_bound)
    return {
        **metrics,
        "buffer/bytes": float(held or 0),
        "admission/credits": float(credits),
        "num_generated_tokens": float(generated or 0) - generated_before,
        "staleness/dropped": float(counters.dropped.get("stale", 0)),
        "ledger/admitted": float(counters.admitted),
        "ledger/in_flight": float(counters.in_flight),
        "ledger/retried": float(counters.retried),
        "ledger/dead": float(sum(counters.dead.values())),
    }
