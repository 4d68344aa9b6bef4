"""The charts of a run, in four sections, and the numbers on top: what each snapshot shows on the page."""

from __future__ import annotations

import math
from collections.abc import Callable

from sluice.common.pipeline import QUEUES, ROLES
from sluice.dashboard.charts import Chart, Curve, Points, curve_of
from sluice.dashboard.rows import ago, number
from sluice.dashboard.snapshots import Snapshot

MIB = 1 / 2**20
TIMES = {
    "time/wait_for_batch": "waiting",
    "time/forward_backward": "forward, backward",
    "time/optimizer": "optimizer",
    "time/publish_pause": "publishing",
}
MAX_AGES = 8
"Policy ages with a layer of their own; the rest is one."
BINS = 20
"Bars of the reward histogram."
RECENT_STEPS = 20
"Steps of which it shows the rewards, the first ones and the newest."


def metric(
    names: dict[str, str], *, right: dict[str, str] | None = None, scale: float = 1.0
) -> Callable[[Snapshot], list[Curve]]:
    """Return curves of metrics -> their names; `right` on the axis on the right."""

    def curves(snapshot: Snapshot) -> list[Curve]:
        found = [
            Curve(name=shown, points=curve_of(snapshot.steps, key, scale=scale), on_right=on_right)
            for chosen, on_right in ((names, False), (right or {}, True))
            for key, shown in chosen.items()
        ]
        return [curve for curve in found if curve.points]

    return curves


def reward(snapshot: Snapshot) -> list[Curve]:
    """Return the mean reward, and where there are several functions, each one's."""
    names = {name for step in snapshot.steps[-50:] for name in step if name.startswith("reward/")}
    functions = sorted(name for name in names if name.count("/") == 2)
    mean = Curve(name="mean", points=curve_of(snapshot.steps, "reward/mean"))
    if len(functions) < 2:
        return [mean]
    return [mean, *(Curve(name=n.split("/")[1], points=curve_of(snapshot.steps, n), is_dashed=True) for n in functions)]


def evaluations(snapshot: Snapshot) -> list[Curve]:
    """Return scores with their standard errors, at the step that made the evaluated version."""
    made_by = {step["version"]: step["step"] for step in snapshot.steps if "version" in step}
    scores: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for entry in snapshot.evaluations:
        for name, value in entry.items():
            dataset, _, score = name.removeprefix("eval/").rpartition("/")
            if name.startswith("eval/") and "@" in score and not score.endswith("_stderr") and math.isfinite(value):
                version = entry[f"eval/{dataset}/version"]
                error = entry.get(f"{name}_stderr", math.nan)
                scores.setdefault((dataset, score), {})[made_by.get(version, version)] = (value, error)
    has_several = len({dataset for dataset, _ in scores}) > 1
    return [
        Curve(
            name=f"{dataset} {score}" if has_several else score,
            points=[(at, value) for at, (value, _) in sorted(found.items())],
            errors=tuple(error for _, (_, error) in sorted(found.items())),
            has_dots=True,
        )
        for (dataset, score), found in scores.items()
    ]


def reward_histogram(snapshot: Snapshot) -> list[Curve]:
    """Return the share of completions by reward, of the newest steps and of the first ones."""
    steps = [step for step in snapshot.steps if "reward_histogram/low" in step]
    if not steps:
        return []
    low, high = min(s["reward_histogram/low"] for s in steps), max(s["reward_histogram/high"] for s in steps)
    width = (high - low) / BINS or 1.0
    ends = {"first steps": steps[: min(RECENT_STEPS, len(steps) // 2)], "newest steps": steps[-RECENT_STEPS:]}
    return [Curve(name=name, points=_shares(chosen, low=low, width=width)) for name, chosen in ends.items() if chosen]


def _shares(steps: list[dict[str, float]], *, low: float, width: float) -> Points:
    """Return (middle of a bar, share of completions) of steps whose own bins lie anywhere between the ends."""
    counts = [0.0] * BINS
    for step in steps:
        bins = sorted(int(n.rpartition("/")[2]) for n in step if n.startswith("reward_histogram/") and n[-1].isdigit())
        first, own = (
            step["reward_histogram/low"],
            (step["reward_histogram/high"] - step["reward_histogram/low"]) / len(bins),
        )
        for i in bins:
            at = first + own * (i / (len(bins) - 1)) * len(
                bins
            )  # the lowest bin at the lowest reward, the highest at the highest
            counts[min(int((at - low) / width), BINS - 1)] += step[f"reward_histogram/{i}"]
    total = sum(counts) or 1.0
    return [(low + (i + 0.5) * width, count / total) for i, count in enumerate(counts)]


def ages(snapshot: Snapshot) -> list[Curve]:
    """Return groups trained at each age."""
    steps = snapshot.steps
    found = sorted({int(name.split("/")[1]) for step in steps for name in step if name.startswith("policy_age/")})
    layers = [
        Curve(name=f"age {age}", points=curve_of(steps, f"policy_age/{age}", otherwise=0.0)) for age in found[:MAX_AGES]
    ]
    if rest := found[MAX_AGES:]:
        older = [(s["step"], sum(s.get(f"policy_age/{age}", 0.0) for age in rest)) for s in steps]
        layers.append(Curve(name=f"older than {found[MAX_AGES - 1]}", points=older))
    return layers


def times(snapshot: Snapshot) -> list[Curve]:
    """Return the times of the steps; `other` is the rest of the step."""
    layers = [Curve(name=name, points=curve_of(snapshot.steps, m, otherwise=0.0)) for m, name in TIMES.items()]
    timed = [step for step in snapshot.steps if "time/step" in step]
    rest = [(s["step"], max(0.0, s["time/step"] - sum(s.get(m, 0.0) for m in TIMES))) for s in timed]
    return [*layers, Curve(name="other", points=rest)] if timed else []


def by_queue(key: str) -> Callable[[Snapshot], list[Curve]]:
    """Return one curve per queue that ever held a message."""
    return lambda snapshot: [
        Curve(name=queue, points=points)
        for queue in QUEUES
        for points in [curve_of(snapshot.steps, f"queue/{queue}/{key}")]
        if any(value for _, value in points)
    ]


SECTIONS: dict[str, list[Chart]] = {
    "Learning": [
        Chart(title="Reward", unit="score", curves=reward,
              about="Mean over the completions of each batch, before length penalties."),
        Chart(title="Evaluation", unit="share correct", curves=evaluations, about="Held-out sets; bars are standard errors."),
        Chart(title="Reward histogram", unit="share of completions", curves=reward_histogram, is_histogram=True,
              about="The newest steps against the first ones."),
        Chart(title="Response length", unit="tokens", right_unit="share", about="Clipped: ran into max_res_tokens.",
              curves=metric({"completions/mean_length": "mean", "completions/max_length": "max"},
                            right={"completions/clipped_ratio": "clipped"})),
        Chart(title="Loss", unit="loss", curves=metric({"loss/policy": "policy"})),
        Chart(title="Entropy", unit="nats", curves=metric({"entropy": "entropy"}),
              about="Of the policy, per token; near 0 it no longer explores."),
        Chart(title="KL to the reference", unit="nats", curves=metric({"loss/kl": "KL"})),
        Chart(title="Without gradient", unit="share", about="Groups whose rewards are all equal; tokens that the loss clips.",
              curves=metric({"frac_reward_zero_std": "equal rewards",
                             "clip_ratio/low": "clipped low", "clip_ratio/high": "clipped high"})),
        Chart(title="Gradient norm, learning rate", unit="norm", right_unit="learning rate",
              curves=metric({"grad_norm": "norm"}, right={"learning_rate": "learning rate"})),
    ],
    "Off-policy": [
        Chart(title="Policy age of trained groups", unit="groups", curves=ages, is_stacked=True,
              about="Optimizer steps between the policy that sampled a group and the one it trained."),
        Chart(title="Effective sample size", unit="share of tokens", curves=metric({"off_policy/ess": "ESS"})),
        Chart(title="Mismatch KL", unit="nats per token", curves=metric({"off_policy/mismatch_kl": "KL"}),
              about="Under 0.015 is healthy."),
        Chart(title="Masked tokens", unit="share", curves=metric({"off_policy/masked_fraction": "masked"})),
        Chart(title="Sampler against trainer", unit="nats",
              curves=metric({"off_policy/logprob_abs_diff": "trained tokens", "off_policy/canary_abs_diff": "canary"})),
        Chart(title="Groups dropped as stale", unit="groups so far", curves=metric({"staleness/dropped": "dropped"})),
    ],
    "Throughput": [
        Chart(title="Tokens", unit="tokens/s",
              curves=metric({"throughput/generated_tokens_per_s": "generated",
                             "throughput/trained_tokens_per_s": "trained"})),
        Chart(title="Step time", unit="s", curves=times, is_stacked=True),
        Chart(title="Idle", unit="share of time", curves=metric({f"idle_fraction/{role}": role for role in ROLES})),
        Chart(title="Publications, size", unit="MiB", curves=metric({"policy/payload_bytes": "moved"}, scale=MIB)),
        Chart(title="Publications, time", unit="s",
              curves=metric({"time/publish": "all of it", "time/publish_pause": "training waited"})),
    ],
    "Pipeline": [
        Chart(title="Messages waiting", unit="messages", curves=by_queue("depth")),
        Chart(title="Oldest message", unit="s", curves=by_queue("oldest_age_s")),
        Chart(title="Groups in flight, credits", unit="groups",
              curves=metric({"ledger/in_flight": "in flight", "admission/credits": "credits"})),
        Chart(title="Ready in the buffer", unit="groups", curves=metric({"buffer/groups": "ready"})),
        Chart(title="Payload in Redis", unit="MiB", curves=metric({"buffer/bytes": "groups"}, scale=MIB)),
        Chart(title="Retried and dead", unit="so far", curves=metric({"ledger/retried": "retried", "ledger/dead": "dead"})),
    ],
}  # fmt: skip
"""Section -> its charts; the first section is drawn larger."""


def tiles(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return the numbers on top: (name, value)."""
    status, train = snapshot.status, snapshot.status["ledger"].get("train", {})
    return [
        ("step", f"{status['step']:,} / {status['num_steps']:,}"),
        ("reward", number(status["reward"], ".3f")),
        ("policy age", number(status["policy_age"], ".2f")),
        ("trained tokens/s", number(status["trained_tokens_per_s"], ",.0f")),
        ("policy version", str(status["policy"]["version"] or "-")),
        ("last step", ago(status["age_of_last_step_s"])),
        ("in flight", f"{train['in_flight']:,}" if train else "-"),
        ("ledger", "holds" if all(counters["holds"] for counters in status["ledger"].values()) else "BROKEN"),
    ]
