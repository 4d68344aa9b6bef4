"""The signal: how many workers the load asks for, and that it does not flap."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import redis
from builders import for_each, make_config, make_ledger, publish_policy

from sluice.common.config.operations import AutoscaleConfig
from sluice.common.keys import Keys
from sluice.common.monitoring.autoscale import Bounds, Load, Scale, bounds_of, read_loads, read_scales, step, update
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.run import Run

SETTINGS = AutoscaleConfig(up_after_s=5.0, cooldown_s=60.0, wait_s=1.0)
BOUNDS = Bounds(min=1, max=4, concurrency=1, in_flight=16)


class Queue:
    """One queue, looked at once a second."""

    def __init__(self, bounds: Bounds = BOUNDS, settings: AutoscaleConfig = SETTINGS) -> None:
        self.bounds, self.settings = bounds, settings
        self.now, self.done = 1000.0, 0
        self.busy, self.is_held = 1.0, False
        self.state: Scale | None = None
        self.changes: list[tuple[float, int, int]] = []

    def look(self, pending: int, *, done: int = 0) -> int:
        """Step one second with this many stages pending, in which `done` were finished. Returns the desired workers."""
        self.done += done
        before = self.state
        load = Load(pending=pending, waiting=pending, done={"w": self.done}, busy=self.busy, is_held=self.is_held)
        self.state = step(before, load, bounds=self.bounds, settings=self.settings, now=self.now)
        assert Scale.model_validate_json(self.state.model_dump_json()) == self.state
        if before and before.desired != self.state.desired:
            self.changes.append((self.now, before.desired, self.state.desired))
        self.now += 1.0
        return self.state.desired

    def hold(self, pending: int, *, seconds: int, done: int = 0) -> list[int]:
        return [self.look(pending, done=done) for _ in range(seconds)]


def test_a_lasting_load_is_met_at_once_and_left_slowly() -> None:
    queue = Queue()
    queue.hold(0, seconds=30)
    # mean owed after t seconds of 16: 16 (1 - e^(-t/5)); over 1.1 after the first second, and 5 s later it is over 4.4
    wanted = queue.hold(16, seconds=30)
    assert wanted[:5] == [1] * 5
    assert wanted[6:] == [4] * 24
    # while the mean decays 3 are needed for a moment, and the highest need of the cooldown counts
    wanted = queue.hold(0, seconds=180)
    assert wanted[:60] == [4] * 60
    assert wanted[-1] == 1
    assert [(before, after) for _, before, after in queue.changes] == [(1, 4), (4, 3), (3, 1)]


def test_the_number_is_owed_parts_over_parts_per_worker() -> None:
    # 16 in flight, 4 workers at most: 4 parts are a worker's share, though it could take 16 at a time
    bounds = Bounds(min=1, max=4, concurrency=16, in_flight=16)
    assert bounds.share == 4
    assert [Queue(bounds).hold(pending, seconds=60)[-1] for pending in (0, 4, 5, 8, 9, 12, 16)] == [1, 1, 2, 2, 3, 3, 4]
    assert Bounds(min=1, max=4, concurrency=2, in_flight=16).share == 2
    assert Bounds(min=0, max=0, concurrency=2, in_flight=16).share == 2


def test_a_load_within_the_tolerance_changes_nothing() -> None:
    queue = Queue(Bounds(min=1, max=40, concurrency=10, in_flight=400))
    queue.hold(200, seconds=60)
    assert queue.state and queue.state.desired == 19  # 200 / 1.1 = 181.8: 19 workers of 10
    before = len(queue.changes)
    queue.hold(205, seconds=200)
    queue.hold(181, seconds=200)
    assert len(queue.changes) == before


PHASES: list[tuple[Bounds, list[tuple[int, int, int, int]]]] = [
    # never more workers than groups that may be in flight, but for the minimum
    (Bounds(min=1, max=100, concurrency=1, in_flight=6), [(500, 60, 0, 6)]),
    (Bounds(min=8, max=100, concurrency=1, in_flight=6), [(500, 60, 0, 8)]),
    # 40 a second with 8 pending: a stage is finished in 0.2 s (Little), and another worker would gain nothing
    (BOUNDS, [(8, 120, 40, 1)]),
    (BOUNDS, [(8, 120, 2, 4)]),
    # from none the first stage calls a worker at once
    (Bounds(min=0, max=2, concurrency=16, in_flight=32), [(0, 10, 0, 0), (1, 1, 0, 1), (0, 90, 0, 0)]),
    # a fixed number
    (Bounds(min=3, max=3, concurrency=1, in_flight=16), [(50, 60, 0, 3)]),
]
"""Bounds; (pending, seconds, finished a second, workers at the end) of each phase."""


@for_each(("bounds", "phases"), PHASES)
def test_the_number_that_a_load_calls_for(bounds: Bounds, phases: list[tuple[int, int, int, int]]) -> None:
    queue = Queue(bounds)
    for pending, seconds, done, expected in phases:
        wanted = queue.hold(pending, seconds=seconds, done=done)
        assert wanted[-1] == expected
        assert not pending or set(wanted[20:]) <= {expected}, "not even for a moment"


def test_idle_workers_and_a_held_run_call_for_nobody() -> None:
    """What they wait for, weights for example, more of them would wait for as well; a held run finishes what is in flight."""
    queue = Queue()
    queue.busy = 0.3
    assert queue.hold(16, seconds=90)[-1] == 1
    assert queue.state and queue.state.reason == "16.0 stages pending, but its workers are busy for 30% of their time"
    queue.busy = 0.9
    assert queue.hold(16, seconds=20)[-1] == 4
    queue = Queue(Bounds(min=0, max=4, concurrency=1, in_flight=16))
    queue.is_held = True
    assert queue.hold(16, seconds=60)[-1] == 1, "a first worker it gets"
    queue.is_held = False
    assert queue.hold(16, seconds=6)[-1] == 4


def test_another_process_goes_on_from_the_state() -> None:
    """`Queue.look` already sends the state through JSON; a gap, in which nobody looked, is no evidence for anything."""
    queue = Queue()
    queue.hold(16, seconds=30)
    queue.hold(0, seconds=59)
    queue.now += 100.0
    assert queue.look(0) == 4
    assert queue.hold(0, seconds=60)[-1] == 1
    queue = Queue()
    queue.look(4, done=500)
    queue.done = 0  # a worker that restarts: what it had done is not done once more
    queue.look(4, done=1)
    assert queue.state and queue.state.done_per_s == 0.0


@for_each("seed", range(30))
def test_noise_causes_few_changes_and_none_too_soon(seed: int) -> None:
    """Any load: changes are up_after_s apart, one down is cooldown_s after the one before, ends are kept."""
    rng = random.Random(seed)
    print("seed", seed)
    settings = AutoscaleConfig(up_after_s=rng.choice([2.0, 5.0]), cooldown_s=rng.choice([20.0, 60.0]), wait_s=0.0)
    max_useful = rng.randint(2, 8)
    queue = Queue(Bounds(min=rng.randint(0, 2), max=max_useful, concurrency=rng.choice([1, 4]), in_flight=16), settings)
    seconds, level = 900, 0.0
    for _ in range(seconds):
        if rng.random() < 0.05:
            level = rng.choice([0.0, 2.0, 8.0, 16.0])
        wanted = queue.look(max(0, round(level + rng.gauss(0, 3))), done=rng.randint(0, 3))
        assert queue.bounds.min <= wanted <= max_useful
    for (at, _, _), (following, before, after) in pairwise(queue.changes):
        # from none: at once
        assert following - at >= (settings.cooldown_s if after < before else settings.up_after_s if before else 0.0)
    times = [at for at, _, _ in queue.changes]
    downs = [at for at, before, after in queue.changes if after < before]
    assert len(downs) <= seconds / settings.cooldown_s
    reversals = sum((b - a) * (d - c) < 0 for (_, a, b), (_, c, d) in pairwise(queue.changes))
    assert reversals <= 2 * len(downs)
    for start in range(0, seconds, 60):
        within = [at for at in times if start <= at - 1000 < start + 60]
        assert len(within) <= math.ceil(60 / settings.up_after_s) + 1


@for_each("period", [2, 7, 20, 50])
def test_load_that_comes_and_goes_within_the_cooldown_does_not_flap(period: int) -> None:
    queue = Queue()
    for second in range(1200):
        queue.look(16 if second % period < period // 2 else 0)
    assert all(after > before for _, before, after in queue.changes)
    assert len(queue.changes) <= 3


def test_bounds_come_from_the_config() -> None:
    bounds = bounds_of(make_config(replicas={"rollout": {"min": 1, "max": 8}}, rollout={"concurrency": 3}))
    assert (bounds["rollout"].min, bounds["rollout"].max, bounds["rollout"].share) == (1, 8, 1)
    assert (bounds["eval"].min, bounds["eval"].max) == (0, 0)  # no evaluation set
    evaluated = make_config(evaluation={"datasets": [{"dataset": {"path": "heldout.jsonl"}}]})
    assert bounds_of(evaluated)["eval"].max == 1


def test_a_tick_writes_what_every_queue_should_have(client: redis.Redis, keys: Keys) -> None:
    config = make_config(replicas={"reward": {"min": 2, "max": 4}})
    run = Run(name=keys.run, keys=keys, config=config, assets={}, folder="")
    publish_policy(client, keys, 0)
    ledger = make_ledger(client, keys)
    admitted = ledger.admit(8)
    assert len(admitted.cursors) == 4
    for cursor in admitted.cursors[1:]:
        ledger.store(f"t{cursor}", "task", b"task")
    client.lpush(keys.celery_prefix + "rollout", b"a message")
    send_heartbeat(client, keys, "rollout@here:1", {"role": "rollout", "done": 7, "idle_fraction": 0.25})
    send_heartbeat(client, keys, "rollout@here:2", {"role": "rollout", "done": 0, "idle_fraction": 0.75})
    loads = read_loads(client, run)
    assert {queue: load.pending for queue, load in loads.items() if load.pending} == {"dataset": 1, "rollout": 3}
    assert (loads["rollout"].waiting, loads["rollout"].done) == (1, {"rollout@here:1": 7, "rollout@here:2": 0})
    assert (loads["rollout"].busy, loads["reward"].busy) == (0.5, 1.0)
    update(client, run)
    update(client, run)
    scales = read_scales(client, run.keys)
    assert {queue: scale.desired for queue, scale in scales.items()} == {
        "dataset": 1, "rollout": 1, "reference": 1, "reward": 2, "eval": 0,
    }  # fmt: skip
    assert (scales["rollout"].have, scales["rollout"].waiting, scales["reward"].max) == (2, 1, 4)
    assert not any(load.is_held for load in loads.values())
    client.hset(keys.run_record, "draining", '{"who": "me", "at": 0}')
    assert all(load.is_held for load in read_loads(client, run).values())
