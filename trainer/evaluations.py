"""Evaluations as the trainer sees them: which versions are evaluated, and what came of it.

A version is evaluated before training, after it, and every `evaluation.every_steps`; a policy once, also where it is published
again under another version. Results come at any time, perhaps under a restarted trainer: what no trainer has reported yet is in
Redis.
"""

from __future__ import annotations

import logging
from pathlib import Path

import redis

from sluice.common.config import EvalDataset
from sluice.common.ledger import evaluations as evaluation
from sluice.common.policies.lineage import equal_versions, read_lineage
from sluice.common.run import Run
from sluice.trainer.best import settle_best
from sluice.trainer.control_state import ControlReader
from sluice.trainer.heartbeat import DiskRetry

log = logging.getLogger("sluice.trainer")


class Evaluations:
    """The evaluations of one run that this trainer waits for."""

    def __init__(
        self, client: redis.Redis, run: Run, control_state: ControlReader, *, retry_while_disk_full: DiskRetry
    ) -> None:
        self._client, self._run, self._control_state = client, run, control_state
        self._retry_while_disk_full = retry_while_disk_full
        self.unreported = evaluation.unreported(client, run)
        "(set, version) of each that is not finished, or not reported; earlier processes' included"

    def is_due(self, step: int) -> bool:
        """Return whether the policy of this step is evaluated."""
        every = self._control_state.config.evaluation.every_steps
        return step in (0, self._control_state.config.trainer.num_steps) or (every > 0 and step % every == 0)

    def needs_checkpoint(self, step: int) -> bool:
        """Return whether the policy of this step may turn out to be the best, which is kept as a checkpoint."""
        return self._run.config.checkpoint.keep_best is not None and self.is_due(step)

    def missing(self, step: int, *, same_as: int | None) -> tuple[EvalDataset, ...]:
        """Return the sets that the policy of this step is to be evaluated on. same_as: an earlier version of the same policy;
        those that were begun with it, or with one that is equal to it, are not made again."""
        datasets = self._run.config.evaluation.datasets if self.is_due(step) else ()
        if not datasets or same_as is None:
            return datasets
        versions = equal_versions(read_lineage(self._client, self._run.keys), same_as)
        begun = evaluation.begun(self._client, self._run.keys)
        return tuple(d for d in datasets if not any((d.name, version) in begun for version in versions))

    def begin(self, step: int, version: int, *, same_as: int | None) -> tuple[EvalDataset, ...]:
        """Return the sets that this version, about to be published, is evaluated on; await their results from now on."""
        datasets = self.missing(step, same_as=same_as)
        self.unreported |= {(dataset.name, version) for dataset in datasets}
        return datasets

    def metrics(self) -> dict[str, float]:
        """Return those finished since the last call, the oldest of each set: one line of metrics holds one version."""
        metrics: dict[str, float] = {}
        sets = {dataset.name: dataset for dataset in self._run.config.evaluation.datasets}
        for name, version in sorted(self.unreported):
            if f"eval/{name}/version" in metrics:
                continue
            found = evaluation.result(self._client, self._run.keys, sets[name], version=version)
            if found is None:
                continue
            self.unreported.discard((name, version))
            # what a reward logged never takes the place of a score
            values = {**found.logged, **found.metrics(), "version": float(version)}
            metrics |= {f"eval/{name}/{metric}": value for metric, value in values.items()}
            log.info("evaluation of version %d on %s: pass@1 %.3f", version, name, found.scores["pass@1"])
        if metrics:
            self.settle_best()
        return metrics

    def settle_best(self) -> None:
        """Update the best checkpoint from all results so far. Raises DiskFull when told to stop meanwhile."""
        checkpoints = Path(self._run.folder) / "checkpoints"
        self._retry_while_disk_full(lambda: settle_best(checkpoints, self._client, self._run))
