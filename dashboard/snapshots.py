"""What the web pages show, read once a second for all browsers together, and only while a page is open.

Nothing here writes. A page asks the `Reader` of its run; the reader keeps what it has read of streams and reads only what is
new. A run comes from the Redis of the dashboard or, by its folder, from its own Redis: that of a run that has ended serves for a
moment, once, and whenever a page asks for more. Of a run folder whose Redis is gone, `folder_files` reads the files.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import redis

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.monitoring.metric_stream import read_events, read_metrics, read_samples
from sluice.common.run import Run, list_runs, open_run
from sluice.dashboard.folder_files import read_folder
from sluice.dashboard.run_state import collect_status

FRESH_S = 1.0
MAX_STEPS = 20_000
"Newest trainer steps that are kept for the curves."
MAX_EVENTS = 2000
RATES_S = 10.0
"Window of the rates."


@dataclass(kw_only=True)
class Snapshot:
    """One run at one moment."""

    status: dict[str, Any]
    config: Config
    "as it was stored"
    steps: list[dict[str, float]]
    "trainer steps, oldest first; one that was trained again after a crash appears once"
    evaluations: list[dict[str, float]]
    "entries that hold results of evaluations"
    events: list[dict[str, str]] = field(default_factory=list)
    "oldest first: at, step, event and its fields"
    rates: dict[str, float] = field(default_factory=dict)
    "groups per second in the last seconds: by role, and trained"
    has_redis: bool = True
    "false: only its folder is left, and in it no queues, processes or groups"


class Folders(Protocol):
    """The run folders of a directory (scripts/launcher/run_folder.py)."""

    def created(self) -> dict[str, float]:
        """Return name -> seconds of creation."""

    def path(self, name: str) -> Path: ...

    def is_live(self, name: str) -> bool:
        """Return whether the Redis of a folder serves a run now."""

    def opened(self, name: str) -> AbstractContextManager[tuple[redis.Redis, Run]]:
        """Open a run on its own Redis. Raises ConfigError where the folder holds none."""


class Reader:
    """One run, for every page that shows it."""

    def __init__(
        self,
        opened: Callable[[], AbstractContextManager[tuple[redis.Redis, Run]]],
        *,
        is_live: Callable[[], bool] = lambda: True,
        folder: Path | None = None,
    ) -> None:
        """Prepare to read. `opened`: the run on its Redis, while the context lasts. `is_live`: whether it may have changed.

        `folder`: of a run that may have no Redis any more.
        """
        self.opened, self._is_live, self.folder = opened, is_live, folder
        self._lock = threading.Lock()
        self._read_at = 0.0
        self._was_live = True
        self._snapshot: Snapshot | None = None
        self._last_entry, self._newest_event, self._newest_sample = "0", "0", "0"
        self._steps: dict[int, dict[str, float]] = {}
        self._evaluations: list[dict[str, float]] = []
        self._events: deque[dict[str, str]] = deque(maxlen=MAX_EVENTS)
        self._samples: list[dict[str, Any]] = []
        self._counts: deque[tuple[float, dict[str, int]]] = deque()

    def read(self) -> Snapshot:
        """Return a snapshot at most FRESH_S old. Raises redis' errors and ConfigError."""
        with self._lock:
            if self._snapshot is None or (time.monotonic() - self._read_at > FRESH_S and self._may_have_changed()):
                self._snapshot = self._fresh()
                self._read_at = time.monotonic()
            return self._snapshot

    def _may_have_changed(self) -> bool:
        """Return whether the run lives, or did when it was last read."""
        before, self._was_live = self._was_live, self._is_live()
        return before or self._was_live

    def _fresh(self) -> Snapshot:
        if self.folder and not (self.folder / "redis").is_dir():
            return Snapshot(**read_folder(self.folder, max_steps=MAX_STEPS), has_redis=False)
        with self.opened() as (client, run):
            for entry, metrics in read_metrics(client, run.keys, after=self._last_entry):
                self._last_entry = entry
                if "reward/mean" in metrics:
                    self._steps[int(metrics["step"])] = metrics
                if any(name.startswith("eval/") for name in metrics):
                    self._evaluations.append(metrics)
            for step in sorted(self._steps)[:-MAX_STEPS]:
                del self._steps[step]
            for entry, event in read_events(client, run.keys, after=self._newest_event):
                self._newest_event = entry
                self._events.append(event)
            status = collect_status(client, run)
        return Snapshot(
            status=status,
            config=run.config,
            steps=[self._steps[step] for step in sorted(self._steps)],
            evaluations=list(self._evaluations),
            events=list(self._events),
            rates=self._rates(status),
        )

    def _rates(self, status: dict[str, Any]) -> dict[str, float]:
        """Return groups per second over the last RATES_S: what each role has done, and what was trained."""
        counts = {f"{stats['role']}|{name}": stats.get("done", 0) for name, stats in status["processes"].items()}
        counts["trained|"] = status["ledger"]["train"]["trained"]
        now = time.monotonic()
        self._counts.append((now, counts))
        while self._counts[0][0] < now - RATES_S:
            self._counts.popleft()
        since, before = self._counts[0]
        rates: dict[str, float] = {}
        for name, count in counts.items():
            role = name.partition("|")[0]
            done = max(0, count - before.get(name, count))  # a process that has started meanwhile counts from then
            rates[role] = rates.get(role, 0.0) + (done / (now - since) if now > since else 0.0)
        return rates

    def samples(self) -> list[dict[str, Any]]:
        """Return kept groups, newest first."""
        with self._lock:
            if self._newest_sample == "0" or self._is_live():
                with self.opened() as (client, run):
                    for entry, sample in read_samples(client, run.keys, after=self._newest_sample):
                        self._newest_sample = entry
                        self._samples.append(sample)
                    del self._samples[: -run.config.metrics.samples_kept or None]
            return self._samples[::-1]


class Readers:
    """The runs of one Redis and of the run folders here; all of them, or those that were named."""

    def __init__(self, client: redis.Redis, names: tuple[str, ...] = (), folders: Folders | None = None) -> None:
        self.client = client
        self._names, self._folders = names, folders
        self._readers: dict[str, Reader] = {}

    def names(self) -> list[str]:
        """Return the names, newest first."""
        created = (self._folders.created() if self._folders else {}) | list_runs(self.client)
        return sorted((n for n in created if not self._names or n in self._names), key=lambda n: -created[n])

    def served(self) -> list[Run]:
        """Return the runs of the dashboard's own Redis."""
        found = list_runs(self.client)
        return [open_run(self.client, name) for name in found if not self._names or name in self._names]

    def of(self, name: str) -> Reader:
        """Return the reader of a run. Raises ConfigError when there is none of that name."""
        if name not in self.names():
            raise ConfigError(f"this dashboard does not show run {name!r}")
        if name not in self._readers:
            self._readers[name] = self._reader(name)
        return self._readers[name]

    def _reader(self, name: str) -> Reader:
        folders = self._folders
        if folders is None or name in list_runs(self.client):
            run = open_run(self.client, name)

            @contextmanager
            def here() -> Iterator[tuple[redis.Redis, Run]]:
                yield self.client, run

            return Reader(here, folder=None)
        return Reader(lambda: folders.opened(name), is_live=lambda: folders.is_live(name), folder=folders.path(name))
