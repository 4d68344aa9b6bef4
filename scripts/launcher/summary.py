"""What `sluice run` prints when a run has ended: what came of it, and what to do next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.dashboard.evaluations import describe
from sluice.dashboard.terminal import ledger_text, sparkline

if TYPE_CHECKING:
    from sluice.trainer.summary import Ended

_MAX_EVALUATIONS = 8
"""Lines of one evaluation set; of more, the first, the best and the last are shown."""


def end_text(ended: Ended, folder: Path) -> str:
    """Describe the end of a run, one line per subject."""
    summary, rewards = ended.summary, ended.rewards
    seconds = max(summary["wall_s"], 1e-9)
    lines = [f"{summary['run']}: {summary['steps']} steps in {seconds:.1f} s, {summary['status']}"]
    lines += [f"  {line}" for line in _evaluation_lines(summary["evaluations"])]
    if None not in (summary["eval_before"], summary["eval_after"]):
        lines.append(f"  held-out greedy accuracy  {summary['eval_before']:.3f} -> {summary['eval_after']:.3f}")
    if rewards:
        ends = f"{summary['reward_first']:.3f} {sparkline(rewards)} {summary['reward_last']:.3f}"
        lines.append(f"  reward     {ends}   (ends: means over a tenth of the steps; {_shown(folder / 'reward.png')})")
    total = sum(summary["policy_age"].values())
    ages = "  ".join(f"{age}: {count} ({count / total:.0%})" for age, count in summary["policy_age"].items())
    lines.append(f"  policy age {ages or '-'}   (groups trained at each age, in optimizer steps)")
    counts = {kind: summary[f"{kind}_tokens"] for kind in ("generated", "trained")}
    lines.append("  tokens     " + ", ".join(f"{n:,} {kind} ({n / seconds:,.0f}/s)" for kind, n in counts.items()))
    lines.append("  ledger     " + ledger_text(ended.counters))
    if summary["restarts"]:
        told = ", ".join(f"{role} {count}x" for role, count in sorted(summary["restarts"].items()))
        lines.append(f"  restarted  {told}")
    return "\n".join(lines)


def next_text(summary: dict[str, Any], folder: Path) -> str:
    """Name the commands that show or use what a run has made."""
    from sluice.trainer.checkpoint import checkpoint_steps  # torch loads here

    name, shown = summary["run"], _shown(folder)
    commands = {f"sluice samples {name}": "prompts, completions and rewards"} if summary["steps"] else {}
    if checkpoint_steps(folder / "checkpoints"):
        commands[f"sluice chat {shown}"] = "talk to the trained model"
        commands[f"sluice export {shown} MODEL_FOLDER"] = "a model folder for transformers or vLLM"
    commands[f"sluice dashboard {name}"] = "the web page of the run"
    width = max(map(len, commands))
    return "\n".join(["next:", *(f"  {command:{width}}   {what}" for command, what in commands.items())])


def _evaluation_lines(evaluations: list[dict[str, Any]]) -> list[str]:
    """Return a line per evaluation; of a set with many, those that matter, and how many more there are."""
    lines: list[str] = []
    for name in dict.fromkeys(entry["dataset"] for entry in evaluations):
        found = [entry for entry in evaluations if entry["dataset"] == name]
        shown = found
        if len(found) > _MAX_EVALUATIONS:
            best = max(found, key=lambda entry: (entry["best"], entry["pass@1"] or 0.0))
            shown = [entry for entry in found if entry in (found[0], best, found[-1])]
        lines += map(describe, shown)
        if len(shown) < len(found):
            lines.append(f"eval {name}: {len(found) - len(shown)} more in summary.json")
    return lines


def _shown(path: Path) -> str:
    """Return a path as short as it can be typed here."""
    return min(str(path), os.path.relpath(path), key=len)
