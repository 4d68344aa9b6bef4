"""The best checkpoint so far, by `checkpoint.keep_best`: named by a file beside `latest`, and kept beyond `checkpoint.keep`.

    <run folder>/checkpoints/best
        {"step": 50, "version": 53, "evaluated_version": 53, "metric": "heldout/pass@1", "value": 0.99}

Evaluations finish later than their step, perhaps under a restarted trainer. So nothing is remembered: the best is computed
again each time from the checkpoints on disk, the results in Redis and the file itself (which replaces results that Redis has
lost). An evaluation counts for a checkpoint when it is of the checkpoint's version, or of one that was published bit for bit
the same at the same step (what a resumed trainer does); one of an abandoned branch counts for none. Of several such
evaluations the first counts, of equal values the earliest step. The untrained model does not compete: it has no checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import redis

from sluice.common.disk import needing_room, replace_text
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.evaluations import Best, read_best
from sluice.common.policies.lineage import equal_versions, read_lineage
from sluice.common.run import Run
from sluice.trainer.checkpoint import remove_old_checkpoints, saved_versions

log = logging.getLogger("sluice.checkpoint")


def best_step(folder: Path) -> int:
    """Return the step of the best checkpoint. Raises ConfigError when none is known."""
    best = read_best(folder)
    if best is None:
        raise ConfigError(
            f"{folder} names no best checkpoint: it needs checkpoint.keep_best in the run's config, and an evaluation of a "
            "trained step"
        )
    return best.step


def update_best(folder: Path, client: redis.Redis, run: Run) -> frozenset[int]:
    """Let `best` name the best checkpoint. Returns the steps whose checkpoints must stay: its, and those whose evaluation is
    not finished. Raises DiskFull."""
    metric = run.config.checkpoint.keep_best
    if metric is None:
        return frozenset()
    name, _, score = metric.rpartition("/")
    (dataset,) = (d for d in run.config.evaluation.datasets if d.name == name)
    saved, before = saved_versions(folder), read_best(folder)
    unfinished = set(evaluation.pending(client, run.keys))  # read before the results: what ends in between is awaited
    candidates: list[Best] = []
    awaited = set()
    for step, versions in _published_as(client, run.keys, saved).items():
        known = before if before is not None and (before.step, before.version) == (step, saved[step]) else None
        for version in reversed(versions):
            found = evaluation.result(client, run.keys, dataset, version=version)
            if found is not None and math.isfinite(value := found.scores[score]):
                known = Best(step=step, version=saved[step], evaluated_version=version, metric=metric, value=value)
        if known is not None:
            candidates.append(known)
        if any(evaluation.evaluation_id(version, name) in unfinished for version in versions):
            awaited.add(step)
    if not candidates:
        return frozenset(awaited)
    best = max(candidates, key=lambda candidate: (candidate.value, -candidate.step))
    if best != before:
        with needing_room(folder, what="the name of the best checkpoint"):
            replace_text(folder / "best", json.dumps(asdict(best)))
        log.info("best checkpoint: step %d, %s %.4f", best.step, metric, best.value)
    return frozenset({*awaited, best.step})


def settle_best(folder: Path, client: redis.Redis, run: Run) -> None:
    """Update `best` after results came in, and remove checkpoints that waited for a result and lost. Raises DiskFull."""
    if run.config.checkpoint.keep_best is not None:
        protected = update_best(folder, client, run)
        remove_old_checkpoints(folder, keep=run.config.checkpoint.keep, protected=protected)


def _published_as(client: redis.Redis, keys: Keys, saved: dict[int, int]) -> dict[int, list[int]]:
    """Return step -> versions that were published with the weights of its checkpoint, its own included, ascending."""
    lineage = read_lineage(client, keys)
    return {step: equal_versions(lineage, version) for step, version in saved.items()}
