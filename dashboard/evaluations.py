"""Finished evaluations of a run, as data and as lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis

from sluice.common.ledger import evaluations as evaluation
from sluice.common.run import Run


def list_evaluations(client: redis.Redis, run: Run) -> list[dict[str, Any]]:
    """Return all finished evaluations (`evaluation.read_all`), by set and version; `best` is true for the best checkpoint's."""
    best = evaluation.read_best(Path(run.folder) / "checkpoints")
    marked = best and (best.metric.rpartition("/")[0], best.evaluated_version)
    entries = evaluation.read_all(client, run)
    return [{**entry, "best": (entry["dataset"], entry["version"]) == marked} for entry in entries]


def describe(entry: dict[str, Any]) -> str:
    """Describe an entry of `list_evaluations` in one line: every score with its standard error, length and clipped share."""
    words = [f"eval {entry['dataset']} at step {entry['step']}:"]
    for name, value in entry.items():
        if value is None or name.endswith("_stderr") or "@" not in name:
            continue
        error = entry[f"{name}_stderr"]
        words.append(f"{name} {value:.3f}" + ("" if error is None else f"±{error:.3f}"))
    if entry["mean_length"] is not None:
        words.append(f"length {entry['mean_length']:.1f}  clipped {entry['clipped_ratio']:.3f}")
    if entry["num_dead"]:
        words.append(f"dead {entry['num_dead']} of {entry['num_asked']}")
    return "  ".join([*words, *(["best"] if entry["best"] else [])])
