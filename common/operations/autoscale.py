"""How many workers each queue should have: a pure function of load and time, and the hash `autoscale` that holds its result.

    dataset worker's tick --read_loads--> step(state, load, now) --write--> hash `autoscale`: queue -> JSON
                                                                              |
                        `sluice run`, Prometheus (KEDA), dashboards  <--------+   they only read

The formula is that of the Kubernetes HPA for an AverageValue metric (kubernetes.io/docs/tasks/run-application/
horizontal-pod-autoscale): desired = ceil(sum of the metric / target per replica), with its tolerance of 10% and its
stabilisation windows. The metric is the parts that a queue owes, waiting and in work, averaged over `up_after_s`;

    share   = parts that one worker should have at a time: its concurrency, or less where all workers together could not
              get so many: min(concurrency, ceil(groups that may be in flight / max))
    desired = ceil(owed / share), in [min, max], and at most one worker per group that may be in flight

Where we differ from the HPA:
* The total is divided, never a ratio multiplied with what runs now: workers that are still loading are not asked for twice.
* Up: over the tolerance for up_after_s without a break, up_after_s after the last change at the earliest, and only if a
  part spends over wait_s here (Little's law: owed / parts finished per second) while the workers are busy for
  busy_share of their time or more; from 0 workers at once. Then to the need of that moment. Not while the run is paused
  or draining, but for a first worker.
* Down: under it for cooldown_s without a break, cooldown_s after the last change at the earliest; to the highest need of
  that time.

So changes are at least up_after_s apart, a change down is cooldown_s away from the one before, and load that comes and
goes within cooldown_s changes nothing. The whole state is in the hash: another dataset worker goes on where one died.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean

import redis

from sluice.common.config import QUEUES, Config
from sluice.common.config.operations import AutoscaleConfig
from sluice.common.ledger.scripts import Scripts
from sluice.common.monitoring.metrics import is_silent, read_heartbeats
from sluice.common.monitoring.queues import queue_depths
from sluice.common.run import Run

TOLERANCE = 0.1
"""Of the HPA: a load that is at most so far from what the present number of workers is for changes nothing."""
GAP_S = 10.0
"""After a longer pause between two steps (no dataset worker, no Redis) nothing is known of the time between."""
_QUEUE_OF = {"task": "dataset", "rollout": "rollout", "reward": "reward", "reference": "reference"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a config says of one queue."""

    min: int
    max: int
    concurrency: int
    "parts that one worker takes at a time"
    in_flight: int
    "groups that admission lets into the run; for `eval`, whose groups need no credit, as many as can be used"

    @property
    def share(self) -> int:
        """Parts that one worker should have at a time, at least 1."""
        return max(1, min(self.concurrency, math.ceil(self.in_flight / max(1, self.max))))

    @property
    def max_useful(self) -> int:
        """Workers that can be of use."""
        return max(self.min, min(self.max, self.in_flight))


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one queue has to do at one moment."""

    pending: int
    "parts waiting or in work, by the ledger"
    waiting: int
    "messages that no worker has taken"
    done: Mapping[str, int]
    "live worker -> parts that it has finished since it started"
    busy: float = 1.0
    "mean share of the last second or so that its live workers were busy for; 1 where none says"
    is_held: bool = False
    "the run is paused or draining: nothing is admitted, so what is owed only gets less"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The result for one queue, and the state that the next step needs: one JSON object of hash `autoscale`."""

    desired: int
    have: int
    "workers that beat"
    min: int
    max: int
    reason: str
    at: float
    "Unix seconds of this step"
    since: float
    "Unix seconds of the last change of `desired`"
    pending: float = 0.0
    "mean over up_after_s"
    waiting: int = 0
    "messages, now"
    done_per_s: float = 0.0
    "parts finished a second, mean over the longer of up_after_s and 10 s"
    busy: float = 1.0
    "share of their time that its workers are busy for, mean over up_after_s"
    done: dict[str, int] = field(default_factory=dict)
    over_since: float | None = None
    "since when more workers are needed without a break"
    under_since: float | None = None
    "since when fewer are"
    under_max: int = 0
    "the most that were needed since then"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Scale:
        return cls(**json.loads(text))


def bounds_of(config: Config) -> dict[str, Bounds]:
    """Every queue's; one that a run on this config has no worker for has max 0."""
    in_flight, evaluations = config.max_in_flight, config.evaluation
    concurrency = {"dataset": 1, "reference": config.reference.concurrency, "reward": config.reward.concurrency}
    found = {}
    for queue in QUEUES:
        min_workers, max_useful = config.replicas.bounds(queue)
        if queue == "eval" and not evaluations.datasets:
            min_workers = max_useful = 0
        slots = concurrency.get(queue, config.rollout.concurrency)
        useful = slots * max(1, max_useful) if queue == "eval" else in_flight
        found[queue] = Bounds(min=min_workers, max=max_useful, concurrency=slots, in_flight=useful)
    return found


def step(state: Scale | None, load: Load, *, bounds: Bounds, settings: AutoscaleConfig, now: float) -> Scale:
    """The next state of one queue, a second or so after `state`; `now` in Unix seconds, of Redis' clock."""
    if state is None or not 0 <= now - state.at <= GAP_S:
        min_workers = bounds.min if state is None else min(max(state.desired, bounds.min), bounds.max_useful)
        since = now if state is None else min(state.since, now)
        state = Scale(
            desired=min_workers,
            have=0,
            min=0,
            max=0,
            reason="",
            at=now,
            since=since,
            pending=load.pending,
            busy=load.busy,
            done=dict(load.done),
        )
    passed = now - state.at
    pending = _mean(state.pending, load.pending, passed, settings.up_after_s)
    finished = sum(max(0, count - state.done.get(name, count)) for name, count in load.done.items())
    rate = _mean(state.done_per_s, finished / max(passed, 1e-9), passed, max(settings.up_after_s, 10.0))
    busy = _mean(state.busy, load.busy, passed, settings.up_after_s)
    have = min(max(state.desired, bounds.min), bounds.max_useful)  # the config may have changed since
    stays_s = pending / rate if rate > 1e-6 else math.inf
    over, under = _need(pending / (1 + TOLERANCE), bounds), _need(pending * (1 + TOLERANCE), bounds)
    if have == 0 and load.pending > 0:
        over = max(over, 1)
    if load.is_held:
        over = min(over, max(have, 1))

    is_worth_it = have == 0 or (stays_s >= settings.wait_s and busy >= settings.busy_share)
    over_since = (state.over_since or now) if over > have and is_worth_it else None
    under_since = (state.under_since or now) if under < have else None
    under_max = max(under, state.under_max if state.under_since else 0)
    if bounds.min == bounds.max:
        desired, reason = have, "a fixed number"
    elif over_since is not None:
        is_due = min(now - over_since, now - state.since) >= settings.up_after_s or have == 0
        desired = over if is_due else have
        reason = f"{pending:.1f} parts owed, {bounds.share} per worker: {over} needed"
    elif under_since is not None:
        is_due = min(now - under_since, now - state.since) >= settings.cooldown_s
        desired = under_max if is_due else have
        reason = f"{pending:.1f} parts owed, {bounds.share} per worker: {under} suffice"
        reason += "" if is_due else f"; fewer after {settings.cooldown_s:g} s of that"
    elif over > have and stays_s < settings.wait_s:
        desired, reason = have, f"{pending:.1f} parts owed, but a part is through in {stays_s:.2f} s"
    elif over > have:
        desired, reason = have, f"{pending:.1f} parts owed, but its workers are busy for {busy:.0%} of their time"
    else:
        desired, reason = have, f"{pending:.1f} parts owed, {bounds.share} per worker: as needed"
    has_changed = desired != state.desired
    return Scale(
        desired=desired,
        have=len(load.done),
        min=bounds.min,
        max=bounds.max,
        reason=reason,
        at=now,
        since=now if has_changed else state.since,
        pending=round(pending, 4),
        waiting=load.waiting,
        done_per_s=round(rate, 6),
        busy=round(busy, 4),
        done=dict(load.done),
        over_since=None if has_changed else over_since,
        under_since=None if has_changed else under_since,
        under_max=0 if has_changed or under_since is None else under_max,
    )


def _need(pending: float, bounds: Bounds) -> int:
    return min(max(math.ceil(pending / bounds.share - 1e-3), bounds.min), bounds.max_useful)


def _mean(before: float, value: float, passed_s: float, over_s: float) -> float:
    """Exponential mean: what lies `over_s` back weighs 1/e."""
    return value + (before - value) * math.exp(-passed_s / over_s)


def read_loads(client: redis.Redis, run: Run) -> dict[str, Load]:
    """Every queue's load now. A silent worker is no live one."""
    has_eval = bounds_of(run.config)["eval"].max > 0
    pending: Counter[str] = Counter()
    for line in client.zrange(run.keys("deadlines"), 0, -1):
        group, _, stage = line.decode().rpartition("|")
        queue = _QUEUE_OF[stage]
        pending["eval" if has_eval and queue == "rollout" and group.startswith("e") else queue] += 1
    depths = queue_depths(client, run, QUEUES)
    is_held = any(client.hmget(run.keys("run"), ["paused", "draining"]))
    done: dict[str, dict[str, int]] = {queue: {} for queue in QUEUES}
    busy: dict[str, list[float]] = {queue: [] for queue in QUEUES}
    for name, stats in read_heartbeats(client, run.keys).items():
        if stats["role"] in done and not is_silent(stats):
            done[stats["role"]][name] = int(stats.get("done", 0))
            busy[stats["role"]].append(1.0 - stats.get("idle_fraction", 0.0))
    return {
        queue: Load(
            pending=pending[queue],
            waiting=depths[queue],
            done=done[queue],
            busy=fmean(busy[queue] or [1.0]),
            is_held=is_held,
        )
        for queue in QUEUES
    }


def read_scales(client: redis.Redis, run: Run) -> dict[str, Scale]:
    """Queue -> what hash `autoscale` says; empty before the first tick of a dataset worker."""
    held = client.hgetall(run.keys("autoscale"))
    return {queue.decode(): Scale.from_json(text) for queue, text in held.items()}


def update(client: redis.Redis, run: Run) -> None:
    """One step for every queue. One process at a time; works while Redis is full, too."""
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    states, loads = read_scales(client, run), read_loads(client, run)
    found = {
        queue: step(states.get(queue), loads[queue], bounds=bounds, settings=run.config.autoscale, now=now).to_json()
        for queue, bounds in bounds_of(run.config).items()
    }
    Scripts(client, run.keys)("write_record", "HSET", "autoscale", *(text for pair in found.items() for text in pair))
