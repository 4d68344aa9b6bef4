"""What the web pages show, read from Redis once a second for all browsers together, and only while a page is open.

Nothing here writes. A page asks the `Reader` of its run; the reader keeps what it has read of streams and reads only what is
new.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import redis

from sluice.common.errors import ConfigError
from sluice.common.monitoring.metric_stream import read_metrics, read_samples
from sluice.common.operations.control import read_change_log
from sluice.common.run import Run, list_runs, open_run
from sluice.dashboard.run_state import collect_status

FRESH_S = 1.0
MAX_STEPS = 20_000
"Newest trainer steps that are kept for the curves."


@dataclass(kw_only=True)
class Snapshot:
    """One run at one moment."""

    status: dict[str, Any]
    steps: list[dict[str, float]]
    "trainer steps, oldest first; one that was trained again after a crash appears once"
    evaluations: list[dict[str, float]]
    "entries that hold results of evaluations"
    change_log: list[dict[str, str]]
    "newest first: at, who, step, key, old, new"


class Reader:
    """One run, for every page that shows it."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self.run = run
        self.client = client
        self._lock = threading.Lock()
        self._read_at = 0.0
        self._snapshot: Snapshot | None = None
        self._last_entry = "0"
        self._steps: dict[int, dict[str, float]] = {}
        self._evaluations: list[dict[str, float]] = []
        self._samples: list[dict[str, Any]] = []
        self._newest_sample = "0"

    def read(self) -> Snapshot:
        """Return a snapshot at most FRESH_S old. Raises redis' errors."""
        with self._lock:
            if self._snapshot is None or time.monotonic() - self._read_at > FRESH_S:
                self._snapshot = self._fresh()
                self._read_at = time.monotonic()
            return self._snapshot

    def _fresh(self) -> Snapshot:
        for entry, metrics in read_metrics(self.client, self.run.keys, after=self._last_entry):
            self._last_entry = entry
            if "reward/mean" in metrics:
                self._steps[int(metrics["step"])] = metrics
            if any(name.startswith("eval/") for name in metrics):
                self._evaluations.append(metrics)
        return Snapshot(
            status=collect_status(self.client, self.run),
            steps=[self._steps[step] for step in sorted(self._steps)[-MAX_STEPS:]],
            evaluations=list(self._evaluations),
            change_log=read_change_log(self.client, self.run.keys, count=20),
        )

    def samples(self) -> list[dict[str, Any]]:
        """Return kept groups, newest first."""
        with self._lock:
            for entry, sample in read_samples(self.client, self.run.keys, after=self._newest_sample):
                self._newest_sample = entry
                self._samples.append(sample)
            del self._samples[: -self.run.config.metrics.samples_kept or None]
            return self._samples[::-1]


class Readers:
    """The runs of one Redis; all of them, or those that were named."""

    def __init__(self, client: redis.Redis, names: tuple[str, ...] = ()) -> None:
        self.client = client
        self._names = names
        self._readers: dict[str, Reader] = {}

    def names(self) -> list[str]:
        """Return the names, newest first."""
        created = list_runs(self.client)
        return sorted((n for n in created if not self._names or n in self._names), key=lambda n: -created[n])

    def of(self, name: str) -> Reader:
        """Return the reader of a run. Raises ConfigError when there is none of that name."""
        if self._names and name not in self._names:
            raise ConfigError(f"this dashboard does not show run {name!r}")
        if name not in self._readers:
            self._readers[name] = Reader(self.client, open_run(self.client, name))
        return self._readers[name]
