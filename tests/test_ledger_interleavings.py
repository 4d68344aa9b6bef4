"""The ledger's identity under random interleavings of all transitions, on both server flavours."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import make_ledger, publish_policy, reward_payload
from consistency import assert_consistent

from sluice.common.connections.client import connect
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger import ledger as ledger_module
from sluice.common.ledger.replay_buffer import ReplayBuffer

pytestmark = pytest.mark.usefixtures("server_flavours")


LEASES = {"running_s": 0.01, "queued_s": 0.02, "max_attempts": 2, "max_interruptions": 2}
WORKER_ACTIONS = {
    "admit": 8, "claim": 26, "finish": 24, "fail": 2, "release": 2, "abandon": 2, "renew": 3, "late": 3, "reap": 8,
    "recover": 1, "drop": 0.3, "requeue": 0.2, "discard": 0.2, "evaluate": 0.7,
}  # fmt: skip
TRAINER_ACTIONS = {"take": 4, "take_again": 2, "publish": 4, "acknowledge": 2, "roll_back": 0.2}
"""Action -> how often, among the others."""


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(ledger_module, "RETRY_WAITS_S", (0.002, 0.004))


class Actors:
    """All roles of a run in one place, doing one random thing at a time with tiny leases, and forgetting half of it."""

    K = 4
    AGE = 2
    MAX_FILTERED = K

    def __init__(self, client, keys, *, seed):
        self.client, self.keys = client, keys
        self.draw = random.Random(seed)
        filtering = {"filter_zero_variance": True, "max_refill": self.MAX_FILTERED // self.K}
        sections = {"lease": LEASES, "trainer": {"loss": {"kl_beta": 0.1}, **filtering}}
        batch = {"batch_size": self.K, "max_policy_age": self.AGE, "max_dead_bytes": 30_000}
        self.ledger = make_ledger(client, keys, worker=f"seed{seed}", replay_buffer=batch, **sections)
        self.buffer = ReplayBuffer(self.ledger, groups_per_step=self.K, max_policy_age=self.AGE)
        self.messages: list[tuple[str, str]] = []
        self.claims = []
        self.old_claims = []
        self.evaluations = 0
        self.step = self.published = self.version = self.newest = self.acknowledged = 0
        self.version_at = {0: 0}
        self.taken: dict[int, list[str]] = {}
        self.taken_under: dict[int, int] = {}
        self.trained: Counter[str] = Counter()
        self.dropped: set[str] = set()
        self.filtered: set[str] = set()
        self.num_stored = self.num_evicted = 0

    def admit(self):
        for cursor in self.ledger.admit(self.draw.randint(1, 4)).cursors:
            if self.draw.random() < 0.8:
                self.store_as(f"t{cursor}", "task")

    def store_as(self, group_id, stage):
        versions = [v for v in range(self.version - 3, self.version + 1) if v >= 0]
        version = self.draw.choice(versions[-1:] * 4 + versions)
        size = self.draw.randint(0, 30)
        payload = bytes(size) if stage != "reward" else reward_payload(rewards=(1.0,) * (1 + size % 3))
        # in long stretches nearly all rewards are equal, so that the bound is reached, and in between hardly any
        are_equal = group_id.startswith("e") or int(group_id[1:]) // 16 % 2 == 0
        is_zero_variance = stage == "reward" and self.draw.random() < (0.9 if are_equal else 0.1)
        for _ in range(self.draw.choice([1, 1, 1, 2])):  # sometimes the reply is lost and the call repeated
            made = version if stage == "rollout" else None
            following = self.ledger.store(
                group_id, stage, payload, version=made, num_tokens=size, is_zero_variance=is_zero_variance
            )
            self.num_stored += following is not None
            was_taken = is_zero_variance and following is not None and group_id.startswith("t")
            if was_taken and not self.client.sismember(self.keys.live("train"), group_id):
                self.filtered.add(group_id)
            self.messages += [(group_id, following_part) for following_part in following or ()]

    def pick(self, items):
        return items.pop(self.draw.randrange(len(items))) if items else None

    def claim(self):
        if (message := self.pick(self.messages)) is None:
            return
        if self.draw.random() < 0.1:
            return  # the message is lost
        if self.draw.random() < 0.1:
            self.messages.append(message)  # and this one is delivered twice
        if claim := self.ledger.claim(*message, fields=("task", "cursor")):
            self.claims.append(claim)

    def finish(self):
        if claim := self.pick(self.claims):
            self.store_as(claim.group_id, claim.stage)
            self.old_claims.append(claim)

    def fail(self):
        if claim := self.pick(self.claims):
            self.ledger.fail(claim, reason=self.draw.choice("ab"), detail="d")

    def release(self):
        if (claim := self.pick(self.claims)) and self.ledger.release(claim):
            self.messages.append((claim.group_id, claim.stage))

    def abandon(self):
        if claim := self.pick(self.claims):
            self.old_claims.append(claim)

    def renew(self):
        claims = self.claims[:5] + self.old_claims[-2:]
        self.ledger.renew(claims, progress={claim.group_id: self.draw.choice([0, 9]) for claim in claims})

    def late(self):
        """A worker that lost its lease long ago reports."""
        if claim := self.pick(self.old_claims):
            match self.draw.randrange(3):
                case 0:
                    self.store_as(claim.group_id, claim.stage)
                case 1:
                    self.ledger.fail(claim, reason="late", detail="")
                case _:
                    self.ledger.release(claim)

    def reap(self):
        self.messages += [(group_id, stage) for group_id, stage, _ in self.ledger.reap(self.draw.choice([1, 200]))]

    def recover(self):
        assert self.ledger.recover() == [], "nothing is lost here"

    def requeue(self):
        if dead := self.client.zrange(self.keys.dead, 0, 0):
            group_id = dead[0].decode()
            self.messages += [(group_id, stage) for stage in self.ledger.requeue(group_id)]

    def discard(self):
        self.ledger.discard(self.client.zrange(self.keys.dead, 0, 0) or ["t0"])

    def drop(self):
        live = [g.decode() for g in self.client.srandmember(self.keys.live("train"), 1)]
        if live and self.ledger.drop(live, reason=self.draw.choice(["prompt_too_long", "bad_row"])):
            assert live[0] not in self.dropped
            self.dropped.add(live[0])

    def evaluate(self):
        name = f"{self.version}.s{self.evaluations}"
        self.evaluations += 1
        self.client.hset(self.keys.evaluations, name, self.version)
        tasks = {f"e{name}.{i}g": b"task" for i in range(self.draw.randint(1, 3))}
        for _ in range(self.draw.choice([1, 2])):
            self.messages += self.ledger.admit_eval(name, dataset="s", version=self.version, tasks=tasks)

    def take(self, step=None):
        step = step or self.step + 1
        version = self.taken_under.setdefault(step, self.version) if step in self.taken else self.version
        reply = self.ledger.scripts("sample", step, self.K, version, self.AGE, -1, "", "mark")
        self.num_evicted += int(reply[0])
        group_ids = [g.decode() for g in reply[2:]]
        if step in self.taken:
            assert group_ids == self.taken[step], "a retried take returned another batch"
        elif group_ids:
            assert len(set(group_ids)) == self.K
            self.taken[step], self.taken_under[step] = group_ids, version
            self.step = step
        return group_ids

    def take_again(self):
        if self.taken:
            self.take(self.draw.choice(list(self.taken)))

    def publish(self):
        if self.published < self.step:
            self.published += 1
            self.publish_next(parent=self.version)
            assert publish_policy(self.client, self.keys, self.version - 1) == 0

    def publish_next(self, *, parent):
        self.newest += 1
        self.version = self.version_at[self.published] = self.newest
        for _ in range(self.draw.choice([1, 2])):
            publish_policy(self.client, self.keys, self.version, parent=parent, step=self.published)

    def acknowledge(self):
        if self.published > self.acknowledged:  # a checkpoint never names a step whose version is not out
            step = self.draw.randint(self.acknowledged + 1, self.published)
            done = [g for s in list(self.taken) if s <= step for g in self.taken.pop(s)]
            settled = self.buffer.acknowledge(step, trained=done)
            self.trained.update(done)
            assert settled == len(done)
            assert self.buffer.acknowledge(step, trained=done) == 0
            self.acknowledged = step

    def roll_back(self):
        """The trainer dies and resumes from its checkpoint: what it sampled since then is sampled again, or dissolved."""
        self.step = self.published = self.acknowledged
        self.taken.clear()
        self.publish_next(parent=self.version_at[self.published])

    def act(self, actions):
        name = self.draw.choices(list(actions), list(actions.values()))[0]
        getattr(self, name)()
        return name

    def drain(self):
        """No new groups: every pending stage is done or its group dies, every full batch is trained."""
        self.claims.clear()
        deadline = time.monotonic() + 20
        while self.client.zcard(self.keys.deadlines):
            assert time.monotonic() < deadline
            self.reap()
            self.claim()
            self.finish()
        while self.take():
            self.publish()
        while self.acknowledged < self.published:
            self.acknowledge()


def check_identity(ledger):
    for kind in ("train", "eval"):
        counters = ledger.counters(kind)
        assert counters.holds, counters
    max_count = Actors.MAX_FILTERED * (1 + Actors.AGE + 1)  # a batch and those that may be ready
    assert int(ledger.client.get(ledger.keys.filtered) or 0) <= max_count


def check_places(actors):
    """At the end every group ever admitted is in exactly one place."""
    client, keys = actors.client, actors.keys
    assert_consistent(client, keys)
    everyone = {f"t{i}" for i in range(int(client.get(keys.cursor)))}
    live = {g.decode() for g in client.smembers(keys.live("train"))}
    dead = {g.decode() for g in client.zrange(keys.dead, 0, -1) if g.startswith(b"t")}
    assert max(actors.trained.values()) == 1, "trained twice"
    places = [set(actors.trained), actors.dropped, actors.filtered, live, dead]
    for a, b in itertools.combinations(places, 2):
        assert not a & b
    counters = actors.ledger.counters()
    assert counters.recovered == 0
    stale = everyone - set().union(*places)  # and those discarded
    assert counters.admitted == len(everyone)
    assert counters.trained == len(actors.trained)
    assert len(stale) - counters.discarded == counters.dropped.get("stale", 0) == actors.num_evicted
    assert len(actors.filtered) == counters.dropped["zero_variance"]
    assert sum(counters.dropped.values()) == actors.num_evicted + len(actors.dropped) + len(actors.filtered)
    assert counters.in_flight == len(live)
    assert sum(counters.dead.values()) == len(dead) + counters.discarded


def test_the_identity_holds_after_each_of_5000_random_transitions(client, keys):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    actors = Actors(client, keys, seed=seed)
    publish_policy(client, keys, 0)
    done = Counter()
    for i in range(5000):
        done[actors.act(WORKER_ACTIONS | TRAINER_ACTIONS)] += 1
        check_identity(actors.ledger)
        if i % 250 == 0:
            assert_consistent(client, keys)
    actors.drain()
    check_places(actors)
    assert set(done) == set(WORKER_ACTIONS | TRAINER_ACTIONS)
    counters = actors.ledger.counters()
    names = "trained", "dead", "discarded", "retried", "interrupted", "resent", "refused", "kept_for_bound"
    reached = [getattr(counters, name) for name in names]
    assert all(reached) and "zero_variance" in counters.dropped, f"some transition never happened: {counters}"
    evaluated = actors.ledger.counters("eval")
    assert (evaluated.in_flight, evaluated.dropped) == (0, {})
    assert evaluation.pending(client, keys) == []


def test_the_identity_holds_at_every_reading_while_threads_race(client, keys, server_flavours):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    publish_policy(client, keys, 0)
    stop = threading.Event()
    shared: list[tuple[str, str]] = []  # one message queue for all threads: the same stage reaches several workers

    def work(number):
        with connect(server_flavours) as connection:
            actors = Actors(connection, keys, seed=seed + number)
            actors.messages = shared
            for _ in range(500):
                actors.version = int(connection.hget(keys.policy, "version"))
                actors.act(without_evaluations)

    def train():
        with connect(server_flavours) as connection:
            actors = Actors(connection, keys, seed=seed + 100)
            while not stop.is_set():
                actors.act(TRAINER_ACTIONS)
            return actors.trained

    without_evaluations = {name: weight for name, weight in WORKER_ACTIONS.items() if name != "evaluate"}
    ledger, snapshots = make_ledger(client, keys), 0
    with ThreadPoolExecutor() as pool:
        trainer, *workers = pool.submit(train), *(pool.submit(work, number) for number in range(3))
        try:
            while not all(worker.done() for worker in workers):
                assert ledger.counters().holds
                snapshots += 1
        finally:
            stop.set()
        for worker in workers:
            worker.result(20)
        assert max(trainer.result(20).values(), default=1) == 1
    assert snapshots > 50
    assert_consistent(client, keys)
