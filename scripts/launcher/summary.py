"""The end of a run: `summary.json`, a reward curve, and what is printed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import redis

from sluice.common.ledger.ledger import Counters, read_counters, read_usage
from sluice.common.monitoring.metric_stream import read_metrics
from sluice.common.run import Run
from sluice.dashboard.evaluations import describe, list_evaluations
from sluice.dashboard.terminal import ledger_text, sparkline


def write_summary(client: redis.Redis, run: Run, *, wall_s: float, restarts: dict[str, int]) -> tuple[bool, str]:
    """Write summary.json and reward.png into the run folder; return whether the ledger holds, and the text for people."""
    steps = [metrics for _, metrics in read_metrics(client, run.keys) if "reward/mean" in metrics]
    latest = {int(metrics["step"]): metrics for metrics in steps}  # a step trained again after a crash counts once
    rewards = [latest[step]["reward/mean"] for step in sorted(latest)]
    # not the very first batch: the groups that finish first are those with short, easy completions
    ends = min(10, max(1, len(rewards) // 10))
    counters, evals = read_counters(client, run.keys), list_evaluations(client, run)
    ours = [entry for entry in evals if entry["dataset"] == run.config.evaluation.datasets[0].name]
    first, last = (ours[0], ours[-1]) if ours else (None, None)
    wall_s = max(wall_s, _training_wall_s(run))
    summary = {
        "run": run.name,
        "steps": max(latest, default=0),
        "eval_before": first and first["pass@1"],
        "eval_after": last["pass@1"] if last and len(ours) > 1 else None,
        "evaluations": evals,
        "reward_first": fmean(rewards[:ends]) if rewards else None,
        "reward_last": fmean(rewards[-ends:]) if rewards else None,
        "wall_s": round(wall_s, 2),
        "generated_tokens": read_usage(client, run.keys).generated_tokens,
        "trained_tokens": int(sum(metrics["num_tokens"] for metrics in latest.values())),
        "policy_age": _age_histogram(list(latest.values())),
        "ledger": counters.to_dict(),
        "ledger_eval": read_counters(client, run.keys, "eval").to_dict(),
        "ledger_holds": counters.holds,
        "restarts": restarts,
    }
    folder = Path(run.folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if rewards:
        _draw(folder / "reward.png", sorted(latest), rewards, evals, title=run.name)
    return counters.holds, _text(summary, rewards, counters, folder)


def _age_histogram(steps: list[dict[str, float]]) -> dict[str, int]:
    """Return policy age in optimizer steps -> groups trained at that age."""
    histogram: Counter[int] = Counter()
    for name, count in (entry for metrics in steps for entry in metrics.items()):
        if name.startswith("policy_age/"):
            histogram[int(name.removeprefix("policy_age/"))] += int(count)
    return {str(age): histogram[age] for age in sorted(histogram)}


def _training_wall_s(run: Run) -> float:
    """Return the seconds of all incarnations of a resumed run, from its last checkpoint."""
    states = sorted((Path(run.folder) / "checkpoints").glob("step-*/state.json"))
    return float(json.loads(states[-1].read_text())["wall_s"]) if states else 0.0


def _text(summary: dict[str, Any], rewards: list[float], counters: Counters, folder: Path) -> str:
    seconds = max(summary["wall_s"], 1e-9)
    lines = [f"{summary['run']}: {summary['steps']} steps in {seconds:.1f} s"]
    lines += ["  " + describe(entry) for entry in summary["evaluations"]]
    if None not in (summary["eval_before"], summary["eval_after"]):
        lines.append(f"  held-out greedy accuracy  {summary['eval_before']:.3f} -> {summary['eval_after']:.3f}")
    if rewards:
        ends = f"{summary['reward_first']:.3f} {sparkline(rewards)} {summary['reward_last']:.3f}"
        lines.append(f"  reward     {ends}   (ends: means over a tenth of the steps; {folder / 'reward.png'})")
    total = sum(summary["policy_age"].values())
    ages = "  ".join(f"{age}: {count} ({count / total:.0%})" for age, count in summary["policy_age"].items())
    lines.append(f"  policy age {ages or '-'}   (groups trained at each age, in optimizer steps)")
    counts = {kind: summary[f"{kind}_tokens"] for kind in ("generated", "trained")}
    lines.append("  tokens     " + ", ".join(f"{n:,} {kind} ({n / seconds:,.0f}/s)" for kind, n in counts.items()))
    lines.append("  ledger     " + ledger_text(counters))
    if summary["restarts"]:
        lines.append(f"  restarted  {summary['restarts']}")
    return "\n".join(lines)


def _draw(path: Path, steps: list[int], rewards: list[float], evals: list[dict[str, Any]], *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(steps, rewards, label="reward (training, sampled)")
    for name in dict.fromkeys(e["dataset"] for e in evals):
        found = [e for e in evals if e["dataset"] == name and None not in (e["step"], e["pass@1"])]
        at, values, errors = ([e[key] or 0.0 for e in found] for key in ("step", "pass@1", "pass@1_stderr"))
        axis.errorbar(at, values, errors, fmt="o-", label=f"{name}, greedy accuracy")
    axis.set(xlabel="optimizer step", ylim=(0, 1.05), title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
