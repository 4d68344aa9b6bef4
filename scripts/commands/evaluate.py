"""`sluice eval`: ask for an evaluation of the newest policy and wait for it; `--list`: what all evaluations found."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import redis

from sluice.common.connections.broker import make_app, send
from sluice.common.errors import ConfigError, SluiceError
from sluice.common.ledger import evaluations as evaluation
from sluice.common.monitoring.diagnosis import explain_stall
from sluice.common.monitoring.metrics import read_heartbeats
from sluice.common.run import Run


def evaluate_latest(client: redis.Redis, run: Run, *, url: str, timeout_s: float) -> list[dict[str, Any]]:
    """Results on every configured set. Raises ConfigError, and SluiceError when it does not finish in time."""
    if not run.config.evaluation.datasets:
        raise ConfigError(f"run {run.name} has no evaluation.datasets in its config")
    heartbeats = read_heartbeats(client, run.keys).values()
    roles = {stats["role"] for stats in heartbeats} | {"eval" for stats in heartbeats if stats.get("evaluates")}
    if missing := {"dataset", "eval", "reward"} - roles:
        raise ConfigError(
            f"an evaluation needs workers on {', '.join(sorted(missing))}: start them with `sluice worker QUEUE`"
        )
    newest = client.hget(run.keys("policy"), "version")
    if newest is None:
        raise ConfigError(f"run {run.name} has published no policy yet: is its trainer running?")
    version = int(newest)
    for dataset in run.config.evaluation.datasets:
        evaluation.request(client, run.keys, dataset, version=version)
    send(make_app(run.name, url=os.environ.get("SLUICE_BROKER_URL") or url), "dataset.evaluate", "dataset")
    deadline = time.monotonic() + timeout_s
    for dataset in run.config.evaluation.datasets:
        while evaluation.result(client, run.keys, dataset, version=version) is None:
            if time.monotonic() > deadline:
                raise SluiceError(
                    f"the evaluation did not finish within {timeout_s:.0f} s: {explain_stall(client, run)}"
                )
            time.sleep(0.2)
    return [entry for entry in list_evaluations(client, run) if entry["version"] == version]


def list_evaluations(client: redis.Redis, run: Run) -> list[dict[str, Any]]:
    """All finished evaluations (`evaluation.read_all`), by set and version; `best` is true on that of the best checkpoint."""
    best = evaluation.read_best(Path(run.folder) / "checkpoints")
    marked = best and (best.metric.rpartition("/")[0], best.evaluated_version)
    entries = evaluation.read_all(client, run)
    return [{**entry, "best": (entry["dataset"], entry["version"]) == marked} for entry in entries]


def describe(entry: dict[str, Any]) -> str:
    """An entry of `list_evaluations` as one line: every score with its standard error, length and share of those cut off."""
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
