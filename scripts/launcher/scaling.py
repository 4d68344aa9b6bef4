"""`sluice run` follows hash `autoscale`: it starts and drains its workers, and says so.

The hash holds what the run as a whole should have; workers started by hand, here or elsewhere, are additional to
`sluice run`'s own, whose number stays within replicas.<queue>. Without the hash (no dataset worker yet) nothing changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import redis

from sluice.common.config.operations import ReplicaRange
from sluice.common.monitoring.autoscale import read_scales
from sluice.common.monitoring.metric_stream import write_event
from sluice.common.run import Run
from sluice.scripts.launcher.roles import worker_bounds
from sluice.scripts.launcher.supervisor import Supervisor

READ_EVERY_S = 0.5


class Scaler:
    """Reads the hash, and acts on it through the supervisor."""

    def __init__(self, client: redis.Redis, run: Run, supervisor: Supervisor, *, say: Callable[[str], None]) -> None:
        self._client, self._run, self._supervisor, self._say = client, run, supervisor, say
        replicas, bounds = run.config.replicas, worker_bounds(run.config)
        is_range = {queue: isinstance(getattr(replicas, queue.partition(",")[0]), ReplicaRange) for queue in bounds}
        self._bounds = {queue: ends for queue, ends in bounds.items() if is_range[queue]}
        self._read_at = 0.0

    def update(self) -> None:
        """Read and scale, at most every READ_EVERY_S. Raises Redis' ConnectionError, having changed nothing."""
        if not self._bounds or time.monotonic() - self._read_at < READ_EVERY_S:
            return
        self._read_at = time.monotonic()
        scales = read_scales(self._client, self._run.keys)
        for queue, (min_workers, max_workers) in self._bounds.items():
            if max_workers and (scale := scales.get(queue.partition(",")[0])):
                self._follow(queue, min(max(scale.desired, min_workers), max_workers), scale.reason)

    def _follow(self, queue: str, desired: int, reason: str) -> None:
        before = self._supervisor.num_workers(queue)
        if before == desired:
            return
        self._supervisor.scale(queue, desired)
        after = self._supervisor.num_workers(queue)
        if after == before:  # draining workers hold every number
            return
        self._say(f"{queue} workers {before} -> {after}: {reason}")
        change = {"queue": queue, "from": before, "to": after, "reason": reason}
        write_event(self._client, self._run.keys, "scaled", **change)
