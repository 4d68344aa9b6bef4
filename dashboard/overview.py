"""The page of one run, or of several side by side: what each reading puts on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sluice.common.pipeline import QUEUES, ROLES
from sluice.dashboard.charts import Points, area, chart, curve, line
from sluice.dashboard.snapshots import Reading

Readings = dict[str, Reading]
Series = Callable[[Readings], list[dict[str, Any]]]
TIMES = {
    "time/wait_for_batch": "waiting",
    "time/forward_backward": "forward, backward",
    "time/optimizer": "optimizer",
    "time/publish_pause": "publishing",
}
MAX_AGES = 8
"Policy ages with a layer of their own; the rest is one."


def _metric(*metrics: str, **names: str) -> Series:
    """Curves of metrics, for each run."""
    shown = {metric: names.get(metric.rpartition("/")[2], metric.rpartition("/")[2]) for metric in metrics}

    def series(readings: Readings) -> list[dict[str, Any]]:
        found = []
        for run, reading in readings.items():
            for metric, name in shown.items():
                if points := curve(reading.steps, metric):
                    found.append(line(_named(run, name, readings), points))
        return found

    return series


def _named(run: str, name: str, readings: Readings) -> str:
    return name if len(readings) == 1 else f"{run} {name}"


def _reward(readings: Readings) -> list[dict[str, Any]]:
    found = []
    for run, reading in readings.items():
        names = {name for step in reading.steps[-50:] for name in step if name.startswith("reward/")}
        found.append(line(_named(run, "mean", readings), curve(reading.steps, "reward/mean")))
        for name in sorted(n for n in names if n.count("/") == 2):
            found.append(line(_named(run, name.split("/")[1], readings), curve(reading.steps, name), dashed=True))
    return found


def _accuracy(readings: Readings) -> list[dict[str, Any]]:
    """Scores of evaluations, at the step that made the version which was judged."""
    found = []
    for run, reading in readings.items():
        made_by = {step["version"]: step["step"] for step in reading.steps if "version" in step}
        scores: dict[str, Points] = {}
        for entry in reading.evaluations:
            for name, value in entry.items():
                dataset, _, score = name.removeprefix("eval/").rpartition("/")
                if name.startswith("eval/") and "@" in score and not score.endswith("_stderr") and math.isfinite(value):
                    version = entry[f"eval/{dataset}/version"]
                    scores.setdefault(f"{dataset} {score}", []).append((made_by.get(version, version), value))
        datasets = {name.split()[0] for name in scores}
        for name, points in scores.items():
            shown = name if len(datasets) > 1 else name.split()[1]
            found.append(line(_named(run, shown, readings), sorted(points), dots=True))
    return found


def _ages(readings: Readings) -> list[dict[str, Any]]:
    """Groups trained at each age, of one run."""
    steps = next(iter(readings.values())).steps
    ages = sorted({int(name.split("/")[1]) for step in steps for name in step if name.startswith("policy_age/")})
    layers = [area(f"age {age}", curve(steps, f"policy_age/{age}", otherwise=0.0)) for age in ages[:MAX_AGES]]
    if rest := ages[MAX_AGES:]:
        older = [(s["step"], sum(s.get(f"policy_age/{age}", 0.0) for age in rest)) for s in steps]
        layers.append(area(f"older than {ages[MAX_AGES - 1]}", older))
    return layers


def _times(readings: Readings) -> list[dict[str, Any]]:
    """Of one run; `other` is what no part accounts for."""
    steps = next(iter(readings.values())).steps
    parts = [area(name, curve(steps, metric, otherwise=0.0)) for metric, name in TIMES.items()]
    rest = [(s["step"], max(0.0, s["time/step"] - sum(s.get(m, 0.0) for m in TIMES))) for s in steps]
    return [*parts, area("other", rest)]


def _by_queue(key: str) -> Series:
    def series(readings: Readings) -> list[dict[str, Any]]:
        found = []
        for run, reading in readings.items():
            for queue in QUEUES:
                points = curve(reading.steps, f"queue/{queue}/{key}")
                if any(value for _, value in points):
                    found.append(line(_named(run, queue, readings), points))
        return found

    return series


PER_RUN: list[tuple[dict[str, Any], Series]] = [
    (chart("Policy age of trained groups", stacked=True), _ages),
    (chart("Step time", unit=" s", stacked=True), _times),
]
"""Stacks, which cannot be laid over one another."""
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


def tiles(reading: Reading) -> list[tuple[str, str]]:
    """The numbers on top: (name, value)."""
    status, train = reading.status, reading.status["ledger"]["train"]
    return [
        ("step", f"{status['step']:,} / {status['num_steps']:,}"),
        ("reward", _number(status["reward"], ".3f")),
        ("policy age", _number(status["policy_age"], ".2f")),
        ("trained tokens/s", _number(status["trained_tokens_per_s"], ",.0f")),
        ("policy version", str(status["policy"]["version"] or "-")),
        ("last step", _ago(status["age_of_last_step_s"])),
        ("in flight", f"{train['in_flight']:,}"),
        ("ledger", "holds" if all(account["holds"] for account in status["ledger"].values()) else "BROKEN"),
    ]


def ledger_rows(reading: Reading) -> list[dict[str, Any]]:
    """One row for each account."""
    rows = []
    for kind, account in reading.status["ledger"].items():
        settled = "scored" if kind == "eval" else "trained"
        rows.append(
            {
                "set": kind,
                "admitted": account["admitted"],
                "settled": f"{settled} {account[settled]:,}",
                "dropped": _reasons(account["dropped"]),
                "dead": _reasons(account["dead"]),
                "in flight": account["in_flight"],
                "retried": account["retried"],
                "resent": account["resent"],
                "refused": account["refused"],
                "identity": "holds" if account["holds"] else "BROKEN",
            }
        )
    return rows


def worker_rows(reading: Reading) -> list[dict[str, Any]]:
    """One row for each process that beats, and one for each queue that nobody serves."""
    rows = []
    status = reading.status
    for role in ROLES:
        mine = {name: facts for name, facts in status["processes"].items() if facts["role"] == role}
        for name, facts in mine.items():
            rows.append(
                {
                    "process": name,
                    "role": role,
                    "host": facts.get("host") or name.partition("@")[2].rpartition(":")[0],
                    "device": facts.get("device", ""),
                    "version": facts.get("version", ""),
                    "digest": facts.get("digest", ""),
                    "tokens/s": _number(facts.get("tokens_per_s"), ",.0f", otherwise=""),
                    "busy": _number(1 - facts["idle_fraction"], ".0%") if "idle_fraction" in facts else "",
                    "running": facts.get("running", ""),
                    "done": facts.get("done", ""),
                    "up": _seconds(facts.get("up_s")),
                    "last beat": _ago(facts["silent_s"]),
                    "note": facts.get("alarm") or "",
                }
            )
    return rows


def queue_rows(reading: Reading) -> list[dict[str, Any]]:
    """Queues with what autoscaling says of them."""
    status = reading.status
    live = [facts["role"] for facts in status["processes"].values()]
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
        for scale in [reading.scaling.get(queue)]
    ]


def order_rows(reading: Reading) -> list[dict[str, Any]]:
    """What operators have changed."""
    return [
        {
            "at": f"{datetime.fromtimestamp(float(order['at'])):%m-%d %H:%M:%S}",
            "step": order["step"],
            "who": order["who"],
            "change": f"{order['key']}: {order['old']} → {order['new']}",
        }
        for order in reading.orders
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
