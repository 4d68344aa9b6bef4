"""Autoscaling: how many workers each queue should have, a pure function of load and time; hash `autoscale` holds the result.

    dataset worker's tick --read_loads--> step(state, load, now) --write--> hash `autoscale`: queue -> JSON
                                                                              |
                        `sluice run`, Prometheus (KEDA), dashboards  <--------+   they only read

The formula is that of the Kubernetes HPA for an AverageValue metric (kubernetes.io/docs/tasks/run-application/
horizontal-pod-autoscale): desired = ceil(sum of the metric / target per replica), with its tolerance of 10% and its
stabilisation windows. The metric is the stages pending in a queue, waiting and running, averaged over `up_after_s`;

    share   = stages that one worker should have at a time: min(concurrency, ceil(admission credits / max))
    desired = ceil(pending / share), in [min, max], and at most one worker per credit

Where we differ from the HPA:
* The total is divided, never a ratio multiplied by the running workers: workers that are still loading are not requested twice.
* Up: over the tolerance for up_after_s without a break, at least up_after_s after the last change, and only if a stage
  spends over wait_s here (Little's law: pending / stages finished per second) while the workers are busy for at least
  busy_share of their time; from 0 workers at once. Then to the need of that moment. Not while the run is paused or
  draining, except for a first worker.
* Down: under it for cooldown_s without a break, at least cooldown_s after the last change; to the highest need of that time.

So changes are at least up_after_s apart, a change down is at least cooldown_s after the previous one, and load that comes
and goes within cooldown_s changes nothing. All state is in the hash: another dataset worker continues it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import redis
from pydantic import BaseModel, ValidationError

from sluice.common.config import Config
from sluice.common.config.operations import AutoscaleConfig
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_pending
from sluice.common.ledger.scripts import Scripts
from sluice.common.monitoring.heartbeats import is_readable, is_silent, read_heartbeats
from sluice.common.monitoring.queues import read_queues
from sluice.common.pipeline import QUEUES, kind_of, stage_of, stage_on
from sluice.common.run import Run, RunRecord

log = logging.getLogger("sluice.autoscale")

TOLERANCE = 0.1
"""Of the HPA: a load within this share of what the present number of workers is for changes nothing."""
GAP_S = 10.0
"""After a longer gap between two steps (no dataset worker, no Redis) the means start anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The limits of one queue, from the config."""

    min: int
    max: int
    concurrency: int
    "stages that one worker runs at a time"
    max_groups: int
    "groups that admission lets into the run; for `eval`, whose groups need no credit, as many as can be used"

    @property
    def share(self) -> int:
        """Stages that one worker should have at a time, at least 1."""
        return max(1, min(self.concurrency, math.ceil(self.max_groups / max(1, self.max))))

    @property
    def max_useful(self) -> int:
        """Highest useful number of workers."""
        return max(self.min, min(self.max, self.max_groups))


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The load of one queue at one moment."""

    pending: int
    "stages waiting or running, by the ledger"
    waiting: int
    "messages that no worker has received"
    done: Mapping[str, int]
    "live worker -> stages that it has finished since it started"
    busy: float = 1.0
    "mean busy share of its live workers since their last heartbeat; 1 where none reports it"
    is_held: bool = False
    "the run is paused or draining: nothing is admitted, so what is pending only gets less"


class Scale(BaseModel, frozen=True):
    """The result for one queue, and the state that the next step needs: one JSON object of hash `autoscale`."""

    desired: int
    at: float
    "Unix seconds of this step"
    since: float
    "Unix seconds of the last change of `desired`"
    have: int = 0
    "workers that send heartbeats"
    min: int = 0
    max: int = 0
    reason: str = ""
    pending: float = 0.0
    "mean over up_after_s"
    waiting: int = 0
    "messages, now"
    done_per_s: float = 0.0
    "stages finished per second, mean over the longer of up_after_s and 10 s"
    busy: float = 1.0
    "busy share of its workers, mean over up_after_s"
    done: dict[str, int] = {}
    over_since: float | None = None
    "since when more workers are needed without a break"
    under_since: float | None = None
    "since when fewer are"
    under_max: int = 0
    "the highest need since then"


def bounds_of(config: Config) -> dict[str, Bounds]:
    """Return the bounds of every queue; max is 0 for one that a run on this config has no worker for."""
    max_groups, evaluations = config.max_credits, config.evaluation
    found = {}
    for queue in QUEUES:
        min_workers, max_useful = config.replicas.bounds(queue)
        if queue == "eval" and not evaluations.datasets:
            min_workers = max_useful = 0
        slots = stage_on(queue).concurrency(config)
        useful = slots * max(1, max_useful) if queue == "eval" else max_groups
        found[queue] = Bounds(min=min_workers, max=max_useful, concurrency=slots, max_groups=useful)
    return found


def step(state: Scale | None, load: Load, *, bounds: Bounds, settings: AutoscaleConfig, now: float) -> Scale:
    """Return the next state of one queue, about a second after `state`; `now` in Unix seconds, of Redis' clock."""
    if state is None or not 0 <= now - state.at <= GAP_S:
        desired = bounds.min if state is None else min(max(state.desired, bounds.min), bounds.max_useful)
        since = now if state is None else min(state.since, now)
        done = dict(load.done)
        state = Scale(desired=desired, at=now, since=since, pending=load.pending, busy=load.busy, done=done)
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
        reason = f"{pending:.1f} stages pending, {bounds.share} per worker: {over} needed"
    elif under_since is not None:
        is_due = min(now - under_since, now - state.since) >= settings.cooldown_s
        desired = under_max if is_due else have
        reason = f"{pending:.1f} stages pending, {bounds.share} per worker: {under} suffice"
        reason += "" if is_due else f"; fewer after {settings.cooldown_s:g} s of that"
    elif over > have and stays_s < settings.wait_s:
        desired, reason = have, f"{pending:.1f} stages pending, but a stage is finished in {stays_s:.2f} s"
    elif over > have:
        desired, reason = have, f"{pending:.1f} stages pending, but its workers are busy for {busy:.0%} of their time"
    else:
        desired, reason = have, f"{pending:.1f} stages pending, {bounds.share} per worker: as needed"
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
    """Return the exponential mean: a value `over_s` old weighs 1/e."""
    return value + (before - value) * math.exp(-passed_s / over_s)


def read_loads(client: redis.Redis, run: Run) -> dict[str, Load]:
    """Read every queue's load. Silent workers do not count as live."""
    has_eval = bounds_of(run.config)["eval"].max > 0
    pending: Counter[str] = Counter()
    for group, stage in read_pending(client, run.keys):
        kind = kind_of(group) if has_eval else "train"  # else the rollout workers evaluate
        pending[stage_of(stage).queue_for(kind)] += 1
    queues = read_queues(client, run, QUEUES)
    is_held = any(RunRecord(client, run.keys).held())
    done: dict[str, dict[str, int]] = {queue: {} for queue in QUEUES}
    busy: dict[str, list[float]] = {queue: [] for queue in QUEUES}
    for name, stats in read_heartbeats(client, run.keys).items():
        if stats["role"] in done and is_readable(stats) and not is_silent(stats):
            done[stats["role"]][name] = int(stats.get("done", 0))
            busy[stats["role"]].append(1.0 - stats.get("idle_fraction", 0.0))
    return {
        q: Load(
            pending=pending[q], waiting=queues[q].depth, done=done[q], busy=fmean(busy[q] or [1.0]), is_held=is_held
        )
        for q in QUEUES
    }


def read_scales(client: redis.Redis, keys: Keys) -> dict[str, Scale]:
    """Return queue -> its state in hash `autoscale`; empty before the first tick of a dataset worker.

    One that cannot be read is ignored, and logged: the next tick begins it anew.
    """
    found = {}
    for queue, text in client.hgetall(keys.autoscale).items():
        try:
            found[queue.decode(errors="replace")] = Scale.model_validate_json(text)
        except ValidationError as error:
            log.warning("the load of queue %r cannot be read, and is ignored: %s", queue, error.errors()[0]["msg"])
    return found


def update(client: redis.Redis, run: Run) -> None:
    """Step every queue. One process at a time; works while Redis is full, too."""
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    states, loads = read_scales(client, run.keys), read_loads(client, run)
    fields = []
    for queue, bounds in bounds_of(run.config).items():
        scale = step(states.get(queue), loads[queue], bounds=bounds, settings=run.config.autoscale, now=now)
        fields += [queue, scale.model_dump_json()]
    Scripts(client, run.keys)("write_record", "HSET", run.keys.autoscale, *fields)
