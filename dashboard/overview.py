"""The page of one run, or of several side by side: what each snapshot shows on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sluice.common.pipeline import QUEUES, ROLES
from sluice.dashboard.charts import Points, area, chart, curve, line
from sluice.dashboard.rows import ago, number
from sluice.dashboard.snapshots import Snapshot

Curves = list[dict[str, Any]]
Series = Callable[[Snapshot], Curves]
TIMES = {
    "time/wait_for_batch": "waiting",
    "time/forward_backward": "forward, backward",
    "time/optimizer": "optimizer",
    "time/publish_pause": "publishing",
}
MAX_AGES = 8
"Policy ages with a layer of their own; the rest is one."


def draw(series: Series, snapshots: dict[str, Snapshot]) -> Curves:
    """Return the curves of a chart; where it shows several runs, each with the name of its run."""
    return [
        shown if len(snapshots) == 1 else shown | {"name": f"{run} {shown['name']}"}
        for run, snapshot in snapshots.items()
        for shown in series(snapshot)
    ]


def _metric(*metrics: str, **names: str) -> Series:
    """Return curves of metrics."""
    shown = {metric: names.get(metric.rpartition("/")[2], metric.rpartition("/")[2]) for metric in metrics}
    return lambda snapshot: [line(n, points) for m, n in shown.items() if (points := curve(snapshot.steps, m))]


def _reward(snapshot: Snapshot) -> Curves:
    names = {name for step in snapshot.steps[-50:] for name in step if name.startswith("reward/")}
    functions = sorted(name for name in names if name.count("/") == 2)
    mean = line("mean", curve(snapshot.steps, "reward/mean"))
    return [mean, *(line(n.split("/")[1], curve(snapshot.steps, n), dashed=True) for n in functions)]


def _accuracy(snapshot: Snapshot) -> Curves:
    """Return scores of evaluations, at the step that made the evaluated version."""
    made_by = {step["version"]: step["step"] for step in snapshot.steps if "version" in step}
    scores: dict[tuple[str, str], Points] = {}
    for entry in snapshot.evaluations:
        for name, value in entry.items():
            dataset, _, score = name.removeprefix("eval/").rpartition("/")
            if name.startswith("eval/") and "@" in score and not score.endswith("_stderr") and math.isfinite(value):
                version = entry[f"eval/{dataset}/version"]
                scores.setdefault((dataset, score), []).append((made_by.get(version, version), value))
    has_several = len({dataset for dataset, _ in scores}) > 1
    return [
        line(f"{dataset} {score}" if has_several else score, sorted(points), dots=True)
        for (dataset, score), points in scores.items()
    ]


def _ages(snapshot: Snapshot) -> Curves:
    """Return groups trained at each age."""
    steps = snapshot.steps
    ages = sorted({int(name.split("/")[1]) for step in steps for name in step if name.startswith("policy_age/")})
    layers = [area(f"age {age}", curve(steps, f"policy_age/{age}", otherwise=0.0)) for age in ages[:MAX_AGES]]
    if rest := ages[MAX_AGES:]:
        older = [(s["step"], sum(s.get(f"policy_age/{age}", 0.0) for age in rest)) for s in steps]
        layers.append(area(f"older than {ages[MAX_AGES - 1]}", older))
    return layers


def _times(snapshot: Snapshot) -> Curves:
    """Return the times of the steps; `other` is the rest of the step."""
    layers = [area(name, curve(snapshot.steps, metric, otherwise=0.0)) for metric, name in TIMES.items()]
    rest = [(s["step"], max(0.0, s["time/step"] - sum(s.get(m, 0.0) for m in TIMES))) for s in snapshot.steps]
    return [*layers, area("other", rest)]


def _by_queue(key: str) -> Series:
    return lambda snapshot: [
        line(queue, points)
        for queue in QUEUES
        for points in [curve(snapshot.steps, f"queue/{queue}/{key}")]
        if any(value for _, value in points)
    ]


PER_RUN: list[tuple[dict[str, Any], Series]] = [
    (chart("Policy age of trained groups", stacked=True), _ages),
    (chart("Step time", unit=" s", stacked=True), _times),
]
"""Stacks, which cannot be overlaid."""
CHARTS: list[tuple[dict[str, Any], Series]] = [
    (chart("Reward"), _reward),
    (chart("Held-out accuracy"), _accuracy),
    (chart("Tokens per second"), _metric("throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s",
                                          generated_tokens_per_s="generated", trained_tokens_per_s="trained")),
    (chart("Messages waiting"), _by_queue("depth")),
    (chart("Oldest message", unit=" s"), _by_queue("oldest_age_s")),
    (chart("Groups in flight"), _metric("ledger/in_flight", "admission/credits", in_flight="in flight")),
    (chart("Off-policy: effective sample size"), _metric("off_policy/ess", ess="ESS")),
    (chart("Off-policy: mismatch KL, nats"), _metric("off_policy/mismatch_kl", mismatch_kl="k3")),
    (chart("Off-policy: masked share, clipped share"),
     _metric("off_policy/masked_fraction", "clip_ratio/low", "clip_ratio/high", masked_fraction="masked")),
    (chart("Gradient norm"), _metric("grad_norm", grad_norm="norm")),
    (chart("Publications: bytes"), _metric("policy/payload_bytes", payload_bytes="moved")),
    (chart("Publications: seconds", unit=" s"), _metric("time/publish", "time/publish_pause", publish_pause="pause")),
    (chart("Completion length, tokens"), _metric("completions/mean_length", "completions/max_length",
                                                 mean_length="mean", max_length="max")),
    (chart("Idle share"), _metric(*(f"idle_fraction/{role}" for role in ROLES))),
]  # fmt: skip


def tiles(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return the numbers on top: (name, value)."""
    status, train = snapshot.status, snapshot.status["ledger"]["train"]
    return [
        ("step", f"{status['step']:,} / {status['num_steps']:,}"),
        ("reward", number(status["reward"], ".3f")),
        ("policy age", number(status["policy_age"], ".2f")),
        ("trained tokens/s", number(status["trained_tokens_per_s"], ",.0f")),
        ("policy version", str(status["policy"]["version"] or "-")),
        ("last step", ago(status["age_of_last_step_s"])),
        ("in flight", f"{train['in_flight']:,}"),
        ("ledger", "holds" if all(counters["holds"] for counters in status["ledger"].values()) else "BROKEN"),
    ]
