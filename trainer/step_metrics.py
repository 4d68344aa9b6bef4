"""Metrics of a trainer step: what they are, and where they go: Redis, JSONL, trackers and the log.

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
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import redis

from sluice.common.config import Config
from sluice.common.disk import rotate, rotated
from sluice.common.errors import PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger.evaluations import mark_reported
from sluice.common.ledger.ledger import Counters, read_counters, read_usage
from sluice.common.monitoring.diagnosis import Cause
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.monitoring.metric_stream import last_metrics, write_metrics
from sluice.common.monitoring.queues import read_queues
from sluice.common.pipeline import QUEUES
from sluice.common.policies.canary import mismatch_bound
from sluice.common.policies.lineage import policy_ages
from sluice.common.run import Run, RunRecord
from sluice.common.types import Group, has_reward_variance
from sluice.trainer.trackers import TrackedRun, TrackerQueue, check_packages, open_trackers, tracked_id

log = logging.getLogger("sluice.trainer")

MAX_BYTES = 64 << 20
MAX_PARTS = 9
"""Bounds of metrics.jsonl: some 300,000 steps, then the oldest part goes. TensorBoard, W&B and Trackio keep all."""
REWARD_BINS = 10
_REPORTED = re.compile(rb'\{"step": (\d+), "version": (\d+)')
"""Beginning of the line of a step."""


class Reporter:
    """Writes one line per step to every sink; trackers start in `begin`."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client = client
        self._run = run
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._last_step, self.last_version = _last_logged(self._path)
        "newest policy version that earlier processes have reported; -1 when there was none"
        check_packages(run.config.metrics)
        self._trackers: list[TrackerQueue] = []

    def begin(self, step: int, config: Config) -> None:
        """Start the trackers: the run continues from this step, under this config."""
        created_at = RunRecord(self._client, self._run.keys).created_at
        tracked = TrackedRun(
            name=self._run.name,
            run_id=tracked_id(self._run.name, created_at),
            project=config.metrics.project,
            folder=Path(self._run.folder),
            config=config.model_dump(mode="json"),
            resumed_step=step,
            told_step=self._last_step,
        )
        self._trackers = open_trackers(config.metrics, tracked)

    def report(self, step: int, version: int, metrics: dict[str, float]) -> None:
        """Report one step. Evaluations in it are marked last: after a kill before that, the next trainer reports them."""
        if dropped := sum(tracker.dropped for tracker in self._trackers):
            metrics = metrics | {"trackers/dropped": float(dropped)}
        line: dict[str, float] = {"step": step, "version": version, "time": time.time()}
        # a reward function may log any name
        metrics = {name: value for name, value in metrics.items() if name not in line}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        write_metrics(self._client, self._run.keys, line | metrics, max_length=self._run.config.metrics.stream_length)
        append_line(self._path, line | finite)
        for tracker in self._trackers:
            tracker.log(step, finite)
        for dataset in self._run.config.evaluation.datasets:
            if (evaluated := metrics.get(f"eval/{dataset.name}/version")) is not None:
                mark_reported(self._client, self._run.keys, dataset=dataset.name, version=int(evaluated))

    def report_stall(self, step: int, cause: Cause, waited_s: float) -> None:
        """Append a stall to metrics.jsonl: for how long, and why. Needs no Redis."""
        stall = {"stall": cause.kind, "cause": cause.text, "waited_s": waited_s}
        append_line(self._path, {"step": step, "time": time.time(), **stall})

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def log_step(step: int, config: Config, metrics: Mapping[str, float]) -> None:
    """Log one line; log an error where a sampler scores the canary otherwise than the trainer."""
    names = ("reward/mean", "loss/policy", "grad_norm", "staleness/mean", "time/wait_for_batch")
    line = "step %d/%d reward %.3f loss %.4f grad_norm %.2f age %.2f waited %.2f s"
    log.info(line, step, config.trainer.num_steps, *(metrics[name] for name in names))
    bound = mismatch_bound(config.rollout.dtype, config.trainer.autocast)
    if (difference := metrics.get("off_policy/canary_abs_diff", 0.0)) > bound:
        log.error(
            "a sampler's logprobs are %.3g nats from the trainer's on the canary (bound %g): see `sluice status`",
            *(difference, bound),
        )


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line of JSON, completely or not at all: a full disk costs lines of this file, never the run.

    Over MAX_BYTES the file is rotated, and MAX_PARTS older parts are kept.
    """
    with suppress(OSError):
        rotate(path, max_bytes=MAX_BYTES, kept=MAX_PARTS)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        log.error("%s was not written to: %s", path, error)
        with suppress(OSError):
            os.truncate(path, size)


def _last_logged(path: Path) -> tuple[int, int]:
    """Return the highest step and newest version of all reported steps, or (-1, -1)."""
    step = version = -1
    for part in rotated(path):
        with part.open("rb") as file:
            for found in filter(None, map(_REPORTED.match, file)):
                step, version = max(step, int(found[1])), max(version, int(found[2]))
    return step, version


def batch_metrics(groups: list[Group], ages: list[int]) -> dict[str, float]:
    """Return rewards, lengths and ages of one batch, and the means of what reward functions logged."""
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [e.reward for e in episodes if e.reward is not None]
    lengths = [len(e.completion.token_ids) for e in episodes]
    metrics = (
        _logged_means(groups)
        | reward_histogram(rewards)
        | {
            "reward/mean": fmean(rewards) if rewards else math.nan,
            "reward/std": pstdev(rewards) if rewards else math.nan,
            "frac_reward_zero_std": fmean(not has_reward_variance(e.reward for e in g.episodes) for g in groups),
            "completions/mean_length": fmean(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": fmean(e.completion.finish_reason == "length" for e in episodes),
            "staleness/mean": fmean(ages),
            "staleness/max": max(ages),
            "staleness/in_queue": fmean(
                g.timestamps.get("leased", 0.0) - g.timestamps.get("ready", 0.0) for g in groups
            ),
            "num_episodes": len(episodes),
            "num_tokens": sum(lengths),
        }
    )
    for name in episodes[0].rewards:
        scores = [s for e in episodes if (s := e.rewards[name]) is not None]
        metrics[f"reward/{name}/mean"] = fmean(scores) if scores else math.nan
    for age, count in Counter(ages).items():
        metrics[f"policy_age/{age}"] = count
    return metrics


def reward_histogram(rewards: Sequence[float]) -> dict[str, float]:
    """Return the ends of the rewards of a batch, and how many are in each of REWARD_BINS equal parts between them."""
    low, high = min(rewards, default=math.nan), max(rewards, default=math.nan)
    if not math.isfinite(high - low):
        return {}
    width = (high - low) / REWARD_BINS or 1.0
    counts = Counter(min(int((reward - low) / width), REWARD_BINS - 1) for reward in rewards)
    bins = {f"reward_histogram/{i}": float(counts[i]) for i in range(REWARD_BINS)}
    return {"reward_histogram/low": low, "reward_histogram/high": high, **bins}


def _logged_means(groups: list[Group]) -> dict[str, float]:
    logged: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for group in groups:
        for name, sums in group.metrics.items():
            logged[name].append(sums)
    return {name: sum(s for s, _ in sums) / sum(n for _, n in sums) for name, sums in logged.items()}


def token_age(client: redis.Redis, keys: Keys, groups: list[Group], *, current: int) -> float:
    """Return the mean policy age over tokens; nan where Redis has lost one of their versions."""
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


class FlowMeter:
    """Metrics of what happens around the trainer: queues, buffer, ledger, how busy workers are, and what they generate."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client, self._run = client, run
        self._generated_tokens = read_usage(client, run.keys).generated_tokens

    def metrics(self, *, step_s: float) -> dict[str, float]:
        """Return the metrics now; generated tokens over the step_s seconds since the last call."""
        usage = read_usage(self._client, self._run.keys)
        before, self._generated_tokens = self._generated_tokens, usage.generated_tokens
        counters = read_counters(self._client, self._run.keys)
        queues = read_queues(self._client, self._run, QUEUES)
        return {
            **{f"queue/{name}/depth": float(queue.depth) for name, queue in queues.items()},
            **{f"queue/{name}/oldest_age_s": queue.oldest_age_s for name, queue in queues.items()},
            **_worker_metrics(read_heartbeats(self._client, self._run.keys).values()),
            **self._filter_metrics(counters),
            "buffer/bytes": float(usage.payload_bytes),
            "admission/credits": float(usage.credits),
            "throughput/generated_tokens_per_s": (self._generated_tokens - before) / step_s,
            "staleness/dropped": float(counters.dropped.get("stale", 0)),
            "ledger/admitted": float(counters.admitted),
            "ledger/in_flight": float(counters.in_flight),
            "ledger/retried": float(counters.retried),
            "ledger/dead": float(sum(counters.dead.values())),
        }

    def _filter_metrics(self, counters: Counters) -> dict[str, float]:
        if not self._run.config.trainer.filter_zero_variance:
            return {}
        dropped = counters.dropped.get("zero_variance", 0)
        return {
            "filter/dropped": float(dropped),
            "filter/dropped_in_step": dropped - last_metrics(self._client, self._run.keys).get("filter/dropped", 0.0),
            "filter/kept_for_bound": float(counters.kept_for_bound),
        }


def _worker_metrics(heartbeats: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Return metrics of what workers report in their heartbeats."""
    metrics: dict[str, float] = {}
    shares: dict[str, list[float]] = defaultdict(list)
    for stats in heartbeats:
        if "idle_fraction" in stats and stats["role"] != "trainer":
            shares[stats["role"]].append(stats["idle_fraction"])
    compared = [stats.get(key) for stats in heartbeats for key in ("mismatch", "cache_mismatch")]
    if differences := [difference for difference in compared if difference is not None]:
        metrics["off_policy/canary_abs_diff"] = max(differences)
    if adapter_shares := [stats["adapter_share"][0] for stats in heartbeats if stats.get("adapter_share")]:
        metrics["off_policy/adapter_share"] = min(adapter_shares)
    return metrics | {f"idle_fraction/{role}": fmean(values) for role, values in shares.items()}
