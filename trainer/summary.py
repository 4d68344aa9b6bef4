"""The end of a run in its folder: `summary.json` and `reward.png`.

    the trainer ends     finished, drained, stopped, or for good (diverged, only losing) --> write_summary
    it was killed        the trainer that replaces it writes them at its own end
    `sluice run` ends    write_summary once more, with what only it knows: the restarts, and why it gave up

So a run whose roles were started one by one has them too. What is the same is not drawn again.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import redis

from sluice.common.disk import replace_text
from sluice.common.ledger.evaluations import read_all
from sluice.common.ledger.ledger import Counters, read_counters, read_usage
from sluice.common.monitoring.metric_stream import read_metrics
from sluice.common.run import Run

log = logging.getLogger("sluice.trainer")

_DRAWN = ("run", "steps", "ended", "evaluations", "reward_first", "reward_last")
"""Keys of the summary that the picture follows from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A run that has ended."""

    summary: dict[str, Any]
    "content of summary.json"
    rewards: list[float]
    "mean training reward of each step"
    counters: Counters
    "of training groups"


def write_summary(
    client: redis.Redis,
    run: Run,
    *,
    status: str,
    failure: str = "",
    wall_s: float,
    restarts: dict[str, int] | None = None,
) -> Ended:
    """Write summary.json and reward.png into the run folder; log where there is no room for them.

    status, failure: as in the run's record. wall_s: seconds of training that the caller knows of. restarts: role -> how often it
    was started again, by a supervisor.
    """
    steps = [metrics for _, metrics in read_metrics(client, run.keys) if "reward/mean" in metrics]
    latest = {int(metrics["step"]): metrics for metrics in steps}  # a step trained again after a crash counts once
    rewards = [latest[step]["reward/mean"] for step in sorted(latest)]
    # not the very first batch: the groups that finish first are those with short, easy completions
    ends = min(10, max(1, len(rewards) // 10))
    counters, evals = read_counters(client, run.keys), read_all(client, run)
    ours = [entry for entry in evals if entry["dataset"] == run.config.evaluation.datasets[0].name]
    first, last = (ours[0], ours[-1]) if ours else (None, None)
    step = max(latest, default=0)
    summary = {
        "run": run.name,
        "status": status,
        "ended": failure or _sentence(status, step),
        "steps": step,
        "eval_before": first and first["pass@1"],
        "eval_after": last["pass@1"] if last and len(ours) > 1 else None,
        "evaluations": evals,
        "reward_first": fmean(rewards[:ends]) if rewards else None,
        "reward_last": fmean(rewards[-ends:]) if rewards else None,
        "wall_s": round(max(wall_s, _training_wall_s(run)), 2),
        "generated_tokens": read_usage(client, run.keys).generated_tokens,
        "trained_tokens": int(sum(metrics["num_tokens"] for metrics in latest.values())),
        "policy_age": _age_histogram(list(latest.values())),
        "ledger": counters.to_dict(),
        "ledger_eval": read_counters(client, run.keys, "eval").to_dict(),
        "ledger_holds": counters.holds,
        "restarts": restarts or {},
    }
    try:
        _write(Path(run.folder), summary, sorted(latest), rewards)
    except Exception as error:  # a full disk, fonts that are missing: what was trained is not lost by it
        log.error("summary.json or reward.png of %s was not written: %s", run.folder, error)
    return Ended(summary=summary, rewards=rewards, counters=counters)


def _sentence(status: str, step: int) -> str:
    return f"all {step} steps are trained" if status == "finished" else f"{status} at step {step}"


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


def _write(folder: Path, summary: dict[str, Any], steps: list[int], rewards: list[float]) -> None:
    path, picture = folder / "summary.json", folder / "reward.png"
    before = json.loads(path.read_text()) if path.exists() else {}
    replace_text(path, json.dumps(summary, indent=2) + "\n")
    if not picture.exists() or any(before.get(key) != summary[key] for key in _DRAWN):
        _draw(picture, summary, steps, rewards)


def _draw(path: Path, summary: dict[str, Any], steps: list[int], rewards: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(steps, rewards, label="reward (training, sampled)")
    evals = summary["evaluations"]
    for name in dict.fromkeys(e["dataset"] for e in evals):
        found = [e for e in evals if e["dataset"] == name and None not in (e["step"], e["pass@1"])]
        at, values, errors = ([e[key] or 0.0 for e in found] for key in ("step", "pass@1", "pass@1_stderr"))
        axis.errorbar(at, values, errors, fmt="o-", label=f"{name}, greedy accuracy")
    axis.set(xlabel="optimizer step", ylim=(0, 1.05), title=summary["run"])
    if summary["status"] == "failed":
        why = "\n".join(textwrap.wrap(summary["ended"].replace("$", r"\$"), 100)[:6])
        axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="firebrick", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
