"""The page of one run, or of several side by side: what each snapshot shows on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sluice.common.pipeline import QUEUES, ROLES
from sluice.dashboard.charts import Points, area, chart, curve, line
from sluice.dashboard.snapshots import Snapshot

Snapshots = dict[str, Snapshot]
Series = Callable[[Snapshots], list[dict[str, Any]]]
TIMES = {
    "time/wait_for_batch": "waiting",
    "time/forward_backward": "forward, backward",
    "time/optimizer": "optimizer",
    "time/publish_pause": "publishing",
}
MAX_AGES = 8
"Policy ages with a layer of their own; the rest is one."


def _metric(*metrics: str, **names: str) -> Series:
    """Return curves of metrics, for each run."""
    shown = {metric: names.get(metric.rpartition("/")[2], metric.rpartition("/")[2]) for metric in metrics}

    def series(snapshots: Snapshots) -> list[dict[str, Any]]:
        found = []
        for run, snapshot in snapshots.items():
            for metric, name in shown.items():
                if points := curve(snapshot.steps, metric):
                    found.append(line(_named(run, name, snapshots), points))
        return found

    return series


def _named(run: str, name: str, snapshots: Snapshots) -> str:
    return name if len(snapshots) == 1 else f"{run} {name}"


def _reward(snapshots: Snapshots) -> list[dict[str, Any]]:
    found = []
    for run, snapshot in snapshots.items():
        names = {name for step in snapshot.steps[-50:] for name in step if name.startswith("reward/")}
        found.append(line(_named(run, "mean", snapshots), curve(snapshot.steps, "reward/mean")))
        for name in sorted(n for n in names if n.count("/") == 2):
            found.append(line(_named(run, name.split("/")[1], snapshots), curve(snapshot.steps, name), dashed=True))
    return found


def _accuracy(snapshots: Snapshots) -> list[dict[str, Any]]:
    """Return scores of evaluations, at the step that made the evaluated version."""
    found = []
    for run, snapshot in snapshots.items():
        made_by = {step["version"]: step["step"] for step in snapshot.steps if "version" in step}
        scores: dict[str, Points] = {}
        for entry in snapshot.evaluations:
            for name, value in entry.items():
                dataset, _, score = name.removeprefix("eval/").rpartition("/")
                if name.startswith("eval/") and "@" in score and not score.endswith("_stderr") and math.isfinite(value):
                    version = entry[f"eval/{dataset}/version"]
                    scores.setdefault(f"{dataset} {score}", []).append((made_by.get(version, version), value))
        datasets = {name.split()[0] for name in scores}
        for name, points in scores.items():
            shown = name if len(datasets) > 1 else name.split()[1]
            found.append(line(_named(run, shown, snapshots), sorted(points), dots=True))
    return found


def _ages(snapshots: Snapshots) -> list[dict[str, Any]]:
    """Return groups trained at each age, of one run."""
    steps = next(iter(snapshots.values())).steps
    ages = sorted({int(name.split("/")[1]) for step in steps for name in step if name.startswith("policy_age/")})
    layers = [area(f"age {age}", curve(steps, f"policy_age/{age}", otherwise=0.0)) for age in ages[:MAX_AGES]]
    if rest := ages[MAX_AGES:]:
        older = [(s["step"], sum(s.get(f"policy_age/{age}", 0.0) for age in rest)) for s in steps]
        layers.append(area(f"older than {ages[MAX_AGES - 1]}", older))
    return layers


def _times(snapshots: Snapshots) -> list[dict[str, Any]]:
    """Return the times of one run's steps; `other` is the rest of the step."""
    steps = next(iter(snapshots.values())).steps
    layers = [area(name, curve(steps, metric, otherwise=0.0)) for metric, name in TIMES.items()]
    rest = [(s["step"], max(0.0, s["time/step"] - sum(s.get(m, 0.0) for m in TIMES))) for s in steps]
    return [*layers, area("other", rest)]


def _by_queue(key: str) -> Series:
    def series(snapshots: Snapshots) -> list[dict[str, Any]]:
        found = []
        for run, snapshot in snapshots.items():
            for queue in QUEUES:
                points = curve(snapshot.steps, f"queue/{queue}/{key}")
                if any(value for _, value in points):
                    found.append(line(_named(run, queue, snapshots), points))
        return found

    return series


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
        ("reward", _number(status["reward"], ".3f")),
        ("policy age", _number(status["policy_age"], ".2f")),
        ("trained tokens/s", _number(status["trained_tokens_per_s"], ",.0f")),
        ("policy version", str(status["policy"]["version"] or "-")),
        ("last step", _ago(status["age_of_last_step_s"])),
        ("in flight", f"{train['in_flight']:,}"),
        ("ledger", "holds" if all(counters["holds"] for counters in status["ledger"].values()) else "BROKEN"),
    ]


def ledger_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return one row of counters per kind."""
    rows = []
    for kind, counters in snapshot.status["ledger"].items():
        settled = "scored" if kind == "eval" else "trained"
        rows.append(
            {
                "set": kind,
                "admitted": counters["admitted"],
                "settled": f"{settled} {counters[settled]:,}",
                "dropped": _reasons(counters["dropped"]),
                "dead": _reasons(counters["dead"]),
                "in flight": counters["in_flight"],
                "retried": counters["retried"],
                "resent": counters["resent"],
                "refused": counters["refused"],
                "identity": "holds" if counters["holds"] else "BROKEN",
            }
        )
    return rows


def worker_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return one row for each process that sends heartbeats."""
    rows = []
    status = snapshot.status
    for role in ROLES:
        mine = {name: stats for name, stats in status["processes"].items() if stats["role"] == role}
        for name, stats in mine.items():
            rows.append(
                {
                    "process": name,
                    "role": role,
                    "host": stats.get("host") or name.partition("@")[2].rpartition(":")[0],
                    "device": stats.get("device", ""),
                    "version": stats.get("version", ""),
                    "digest": stats.get("digest", ""),
                    "tokens/s": _number(stats.get("tokens_per_s"), ",.0f", otherwise=""),
                    "busy": _number(1 - stats["idle_fraction"], ".0%") if "idle_fraction" in stats else "",
                    "running": stats.get("running", ""),
                    "done": stats.get("done", ""),
                    "up": _seconds(stats.get("up_s")),
                    "heartbeat": _ago(stats["silent_s"]),
                    "note": stats.get("alarm") or "",
                }
            )
    return rows


def queue_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return one row per queue, with the result of autoscaling."""
    status = snapshot.status
    live = [stats["role"] for stats in status["processes"].values()]
    return [
        {
            "queue": queue,
            "waiting": status["queues"][queue],
            "oldest": _seconds(status["oldest_age_s"][queue]),
            "workers": live.count(queue),
            "wanted": scale.desired if scale else "",
            "why": scale.reason if scale else "",
        }
        for queue in QUEUES
        for scale in [snapshot.scaling.get(queue)]
    ]


def change_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return one row per change in the change log."""
    return [
        {
            "at": f"{datetime.fromtimestamp(float(change['at'])):%m-%d %H:%M:%S}",
            "step": change["step"],
            "who": change["who"],
            "change": f"{change['key']}: {change['old']} → {change['new']}",
        }
        for change in snapshot.change_log
    ]


def _number(value: float | None, form: str, *, otherwise: str = "-") -> str:
    return format(value, form) if value is not None and math.isfinite(value) else otherwise


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _ago(value: float | None) -> str:
    return "-" if value is None else f"{_seconds(value)} ago"


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) or "0"
