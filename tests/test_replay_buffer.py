"""The replay buffer against a plain Python model of its rules, and each rule on its own."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from builders import file_groups, make_completion, publish_policy, push_group, reward_payload, started_ledger

from sluice.common.connections.client import connect
from sluice.common.errors import PolicyNotFound, StateLost
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.policies.lineage import abandoned_versions, policy_ages
from sluice.common.serialization import encode
from sluice.dashboard.dead_letters import read_dead_letters


def make_buffer(client, keys, *, k=2, max_policy_age=1, version=-1, **options):
    """A ledger in a run that has published the versions 0 to `version`, and its buffer."""
    ledger = started_ledger(client, keys, version=version)
    return ledger, ReplayBuffer(ledger, groups_per_step=k, max_policy_age=max_policy_age, **options)


def ids(sample):
    return [group.group_id for group in sample.groups]


# Rules, one by one


@pytest.mark.parametrize("max_policy_age", [0, 1, 2, 3])
def test_age_equal_to_the_bound_is_kept_and_one_more_is_dropped(client, keys, max_policy_age):
    ledger, buffer = make_buffer(client, keys, version=5, k=1, max_policy_age=max_policy_age)
    oldest_kept, too_old = 5 - max_policy_age, 4 - max_policy_age
    stale, kept = file_groups(ledger, [too_old, oldest_kept])
    sample = buffer.sample(5, step=6)
    assert ids(sample) == [kept]
    assert (sample.evicted, sample.available) == (1, 1)
    assert ledger.counters().dropped == {"stale": 1}
    assert client.exists(keys.group(stale), keys.stream(too_old)) == 0
    file_groups(ledger, [too_old] * 2)
    sample = buffer.sample(5, step=7)
    assert (sample.groups, sample.evicted, sample.available) == (None, 2, 0), "although nothing else is there"


def test_nothing_is_consumed_when_fewer_than_a_batch_is_ready(client, keys):
    ledger, buffer = make_buffer(client, keys, version=1, k=3)
    held = file_groups(ledger, [0, 1])
    for _ in range(3):
        sample = buffer.sample(1, step=2)
        assert (sample.groups, sample.evicted, sample.available) == (None, 0, 2)
    assert client.zcard(keys.batches) == 0
    assert client.xpending(keys.stream(0), "trainer")["pending"] == 0
    held += file_groups(ledger, [1])
    assert sorted(ids(buffer.sample(1, step=2))) == sorted(held)


def test_the_same_step_gives_the_same_batch_also_to_another_process(client, keys, redis_url):
    ledger, buffer = make_buffer(client, keys, version=1)
    file_groups(ledger, [0, 1, 1, 0])
    first = ids(buffer.sample(1, step=2))
    publish_policy(client, keys, 2)
    second = ids(buffer.sample(2, step=3))
    publish_policy(client, keys, 3, parent=1, step=1)  # back to the checkpoint of step 1, as version 3
    other = connect(redis_url)
    _, after_crash = make_buffer(other, keys)
    assert ids(after_crash.sample(3, step=2)) == first
    other.close()
    assert set(first).isdisjoint(second)


def test_a_batch_too_old_for_the_branch_after_a_roll_back_is_dissolved_and_those_after_it(client, keys):
    ledger, buffer = make_buffer(client, keys, version=2, k=2, max_policy_age=1)
    old, kept = file_groups(ledger, [2, 1])
    assert ids(buffer.sample(2, step=3)) == [kept, old]
    publish_policy(client, keys, 3)
    later = file_groups(ledger, [2, 3])
    assert ids(buffer.sample(3, step=4)) == later
    publish_policy(client, keys, 4, parent=1, step=1)  # back at step 1: version 2 is 1 step away, version 3 is 2
    publish_policy(client, keys, 5, parent=4, step=2)  # and now 2 and 3
    sample = buffer.sample(5, step=3)
    assert (sample.groups, sample.evicted, sample.available) == (None, 3, 1)
    assert ledger.counters().dropped == {"stale": 3}
    (fresh,) = file_groups(ledger, [5])
    assert ids(buffer.sample(5, step=3)) == [kept, fresh]
    assert client.zrange(keys.batches, 0, -1) == [b"3"], "the batch of step 4 is dissolved too"
    assert buffer.acknowledge(3) == 2
    assert ledger.counters().trained == 2


def test_a_policy_made_again_bit_for_bit_keeps_the_groups_of_the_abandoned_branch_young(client, keys):
    ledger, buffer = make_buffer(client, keys, version=3, k=1, max_policy_age=0)
    (group_id,) = file_groups(ledger, [3])
    assert ids(buffer.sample(3, step=4)) == [group_id]
    publish_policy(client, keys, 4, parent=2, step=2)  # back at step 2
    assert abandoned_versions(client, keys, after_step=2) == {3: {"digest-3": 3}}
    publish_policy(client, keys, 5, parent=3, step=3)  # the twin of version 3: its child at no distance
    assert policy_ages(client, keys, [3, 2], current=5) == [0, 1]
    assert ids(buffer.sample(5, step=4)) == [group_id]


# Redis comes back with an older state


def test_a_redis_that_forgot_what_the_trainer_wrote_is_noticed(client, keys):
    ledger, buffer = make_buffer(client, keys, version=2, k=1)
    file_groups(ledger, [2] * 4)
    buffer.sample(2, step=1, published=2)
    before = client.hget(keys.run_record, "mark")
    buffer.sample(2, step=2, published=2)
    client.hset(keys.run_record, "mark", before)  # the taking of step 2 was lost
    buffer.acknowledge(2)  # what is written later does not hide it
    publish_policy(client, keys, 3)
    with pytest.raises(StateLost, match="lost the trainer's last writes"):
        buffer.sample(3, step=3, published=3)
    assert ids(buffer.sample(3, step=3, published=3)), "it is said once; the trainer has repaired what it can"
    with pytest.raises(StateLost):
        buffer.sample(3, step=4, published=4)  # a publication was lost
    with pytest.raises(StateLost):
        buffer.sample(4, step=4, published=3)  # an announcement was lost


@pytest.mark.parametrize("stage", ["task", "rollout", "ready"])
def test_a_group_that_redis_forgot_it_dealt_out_is_settled_by_name_wherever_it_stands(client, keys, stage):
    ledger, buffer = make_buffer(client, keys, version=0, k=1)
    group_id = push_group(ledger, until=stage)
    others = file_groups(ledger, [0, 0])
    assert buffer.acknowledge(1, trained=[group_id]) == 1
    assert buffer.acknowledge(1, trained=[group_id]) == 0
    counters = ledger.counters()
    assert (counters.trained, counters.reconciled, counters.in_flight, counters.holds) == (1, 1, 2, True)
    assert ledger.store(group_id, "rollout", b"late", version=0) is None
    assert [ids(buffer.sample(0, step=step)) for step in (2, 3)] == [[others[0]], [others[1]]]
    assert client.exists(keys.group(group_id)) == 0


def test_a_group_whose_admission_was_lost_is_settled_and_its_cursor_passed_over(client, keys):
    ledger, buffer = make_buffer(client, keys, version=0, k=1)
    push_group(ledger)  # t0; t1 to t3 are beyond the cursor
    assert buffer.acknowledge(1, trained=["t2"]) == 1
    assert buffer.acknowledge(1, trained=["t2"]) == 0
    admitted = [cursor for _ in range(3) for cursor in ledger.admit(1).cursors]
    assert admitted == [1, 3, 4], "t2 is not trained a second time, and t1 and t3 are not skipped"
    assert buffer.acknowledge(1, trained=["t2"]) == 0
    counters = ledger.counters()
    assert (counters.admitted, counters.trained, counters.in_flight, counters.holds) == (5, 1, 4, True)


def test_what_only_a_damaged_checkpoint_held_counts_as_dropped(client, keys):
    ledger, buffer = make_buffer(client, keys, version=0, k=2)
    for step in (1, 2, 3):
        file_groups(ledger, [0, 0])
        buffer.sample(0, step=step)
        buffer.acknowledge(step)
    assert buffer.roll_back(3) == 0
    assert buffer.roll_back(1) == 4
    assert buffer.roll_back(1) == 0
    counters = ledger.counters()
    assert (counters.admitted, counters.trained, counters.dropped, counters.holds) == (6, 2, {"rolled_back": 4}, True)


def test_a_sampled_group_carries_all_that_was_stored(client, keys):
    ledger = started_ledger(client, keys, trainer={"loss": {"kl_beta": 0.1}})
    buffer = ReplayBuffer(ledger, groups_per_step=1, max_policy_age=0)
    group_id = push_group(ledger)
    (group,) = buffer.sample(0, step=1).groups
    assert (group.group_id, group.policy_version, group.prompt, group.target) == (group_id, 0, "1+1", "2")
    assert [e.reward for e in group.episodes] == [1.0, 0.0]
    assert group.episodes[0].rewards == {"MathReward": 1.0}
    assert group.episodes[1].completion.token_ids.tolist() == [0, 1, 2]
    assert group.episodes[1].ref_logprobs.tolist() == [-0.25] * 3
    order = [group.timestamps[name] for name in ("admitted", "rollout", "reward", "reference", "ready", "leased")]
    assert order == sorted(order)


def test_after_the_acknowledgement_nothing_of_a_group_is_left_in_redis(client, keys):
    ledger, buffer = make_buffer(client, keys, version=0)
    group_ids = file_groups(ledger, [0, 0])
    buffer.sample(0, step=1)
    publish_policy(client, keys, 1)
    assert int(client.get(keys.payload_bytes)) > 0
    assert (buffer.acknowledge(1), buffer.acknowledge(1)) == (2, 0)
    left = {key.decode().removeprefix(keys.root) for key in client.scan_iter(match=keys.root + "*", count=1000)}
    assert left == {
        "cursor",
        "counts:train",
        "totals",
        "policy",
        "lineage",
        "publications",
        "bytes",
        "run",
        "settled",
        "ends",
    }
    assert client.get(keys.payload_bytes) == b"0"
    assert not any(client.exists(keys.group(group_id)) for group_id in group_ids)
    assert ledger.counters().trained == 2


@pytest.mark.parametrize(("max_resample_count", "times"), [(0, 1), (1, 2), (3, 4)])
def test_a_group_is_trained_max_resample_count_times_more(client, keys, max_resample_count, times):
    ledger, buffer = make_buffer(client, keys, version=0, max_resample_count=max_resample_count)
    wanted = file_groups(ledger, [0, 0])
    for step in range(1, times + 1):
        assert ids(buffer.sample(0, step=step)) == wanted
        freed = [buffer.acknowledge(step, trained=wanted) for _ in range(2)]  # kept for resampling is not forgotten
        assert freed == [2 if step == times else 0, 0]
    assert buffer.sample(0, step=times + 1).groups is None
    assert (ledger.counters().trained, ledger.counters().in_flight) == (2, 0)


def rollout_with(**changed: Any) -> bytes:
    return encode({"completions": [{**make_completion().to_wire(), **changed}] * 2, "worker": "w"})


@pytest.mark.parametrize(
    ("stage", "damage", "detail"),
    [
        ("rollout", None, "without all of its results: was its key deleted by hand?"),
        ("rollout", b"SL\x01\xc1", "damaged message of 4 bytes"),
        ("rollout", b"\x80\x04.", "not a Sluice message"),
        ("rollout", encode({"completions": [{"text": "no tokens"}]}), "token_ids"),
        ("rollout", rollout_with(token_ids=np.int32([5, -1, 6])), "token ids from -1 to 6, in a vocabulary of 100"),
        ("rollout", rollout_with(token_ids=np.int32([5, 100, 6])), "token ids from 5 to 100, in a vocab"),
        ("rollout", rollout_with(rollout_logprobs=np.float32([0, np.nan, 0])), "a logprob is not finite"),
        ("reference", encode([np.full(3, -np.inf, np.float32)] * 2), "a logprob is not finite"),
        ("reward", reward_payload(rewards=(1.0, float("nan"))), r"a reward is not finite: \[1.0, nan\]"),
        ("rollout", rollout_with(token_ids=np.arange(1)), r"completion 0 has \(1,\) tokens, .* of \[\(3,\)\]"),
        ("reward", encode({"reward": [1.0], "by_function": {}}), "a different number of rewards"),
        ("reward", encode([1, 2]), "list indices"),
        ("reference", encode([np.zeros(3, np.float32)] * 5), "a different number of rewards or reference logprobs"),
        ("task", encode(None), "NoneType"),
    ],
)
def test_a_group_that_cannot_be_read_is_a_dead_letter_and_the_others_of_its_batch_are_trained(
    client, keys, stage, damage, detail
):
    ledger, buffer = make_buffer(client, keys, version=0, k=3)
    buffer.vocab_size = 100
    bad, *sound = file_groups(ledger, [0] * 5)
    if damage is None:
        client.hdel(keys.group(bad), stage)
    else:
        client.hset(keys.group(bad), stage, damage)
    sample = buffer.sample(0, step=1)
    assert (sample.groups, sample.available) == (None, 4)
    trained = ids(buffer.sample(0, step=1))
    assert len(trained) == 3 and set(trained) < set(sound)
    (letter,) = read_dead_letters(client, keys, group=None)
    assert (letter["group"], letter["reason"]) == (bad, "undecodable")
    assert re.search(detail, letter["detail"])
    buffer.acknowledge(1)
    counters = ledger.counters()
    assert (counters.trained, counters.dead, counters.in_flight, counters.holds) == (3, {"undecodable": 1}, 1, True)


# Waiting


def test_the_trainer_wakes_when_a_whole_batch_is_ready_and_not_before(client, keys, redis_url):
    ledger, buffer = make_buffer(client, keys, version=0, k=3)
    assert buffer.sample(0, step=1).groups is None
    with connect(redis_url) as waiting, ThreadPoolExecutor() as pool:
        woken = pool.submit(make_buffer(waiting, keys)[1].wait, 5.0)
        file_groups(ledger, [0])
        file_groups(ledger, [0])
        with pytest.raises(TimeoutError):
            woken.result(0.15)  # two of three groups
        file_groups(ledger, [0])
        assert woken.result(2.0) is True
    assert len(buffer.sample(0, step=1).groups) == 3
    assert client.exists(keys.wake, keys.want) == 0


def test_a_batch_that_completes_between_sample_and_wait_wakes_at_once_and_a_wait_for_none_ends_by_itself(client, keys):
    ledger, buffer = make_buffer(client, keys, version=0)
    buffer.sample(0, step=1)
    assert buffer.wait(0.05) is False
    file_groups(ledger, [0] * 6)
    assert client.llen(keys.wake) == 1, "one wake-up, however many groups"
    assert buffer.wait(1.0) is True
    assert [len(buffer.sample(0, step=step).groups) for step in (1, 2, 3)] == [2] * 3
    buffer.sample(0, step=4)
    file_groups(ledger, [0, 0])
    assert len(buffer.sample(0, step=4).groups) == 2
    assert buffer.wait(0.05) is False, "a batch that was sampled without waiting leaves no wake-up behind"


# Ages through a fork

#   v0 - v1 - v2 - v3 - v4      died after v4 (step 4), resumed from the checkpoint of step 2 as v5
#              \
#               v5 - v6 - v9   v6 (step 3) went on; died, resumed from v6 as v9 (step 3)
#                     \
#                      v7 - v8
FORK = {0: (-1, 0), 1: (0, 1), 2: (1, 2), 3: (2, 3), 4: (3, 4), 5: (2, 2), 6: (5, 3), 7: (6, 4), 8: (7, 5), 9: (6, 3)}
AGES = [
    # version, seen from, age
    (4, 4, 0),
    (0, 4, 4),
    (2, 5, 0),  # the same weights under another name
    (3, 5, 1),  # one step on the abandoned branch
    (4, 5, 2),
    (4, 6, 3),  # 4 -> 2 on the old branch, 2 -> 3 on the new one
    (3, 8, 4),
    (1, 8, 4),
    (8, 9, 2),
    (7, 9, 1),
    (6, 9, 0),
    (4, 9, 3),
    (0, 9, 3),
]


def write_fork(client, keys):
    for version, (parent, step) in FORK.items():
        publish_policy(client, keys, version, parent=parent, step=step)


@pytest.mark.parametrize(("version", "current", "age"), AGES)
def test_the_age_through_a_fork_is_the_same_in_lua_and_in_python(client, keys, version, current, age):
    write_fork(client, keys)
    assert policy_ages(client, keys, [version, current], current=current) == [age, 0]
    ledger, keeps = make_buffer(client, keys, k=9, max_policy_age=age)
    file_groups(ledger, [version])
    assert (keeps.sample(current, step=1).evicted, keeps.sizes()) == (0, {version: 1})
    if age > 0:
        _, drops = make_buffer(client, keys, k=9, max_policy_age=age - 1)
        assert (drops.sample(current, step=1).evicted, drops.sizes()) == (1, {})


def test_a_version_outside_the_lineage_is_too_old_for_any_bound(client, keys):
    write_fork(client, keys)
    with pytest.raises(PolicyNotFound, match="policy version 77 is not in the lineage"):
        policy_ages(client, keys, [77], current=9)
    ledger, buffer = make_buffer(client, keys, k=1, max_policy_age=1000)
    file_groups(ledger, [77])
    assert buffer.sample(9, step=1).evicted == 1


# The whole buffer against a model


class Model:
    """The rules in plain Python: lists per version, ages by walking a tree."""

    def __init__(self, *, k, max_policy_age, max_resample_count):
        self.k, self.max_age, self.limit = k, max_policy_age, max_resample_count
        self.parent, self.step_of = {0: None}, {0: 0}
        self.unread: dict[int, list[str]] = {}
        self.batches: dict[int, list[tuple[str, int]]] = {}
        self.times: Counter[str] = Counter()
        self.trained = self.stale = self.added = 0

    def publish(self, version, *, parent):
        self.parent[version], self.step_of[version] = parent, self.step_of[parent] + 1

    def line(self, version):
        found = []
        while version is not None:
            found.append(version)
            version = self.parent[version]
        return found

    def age(self, version, current):
        fork = next(v for v in self.line(version) if v in set(self.line(current)))
        return self.step_of[version] + self.step_of[current] - 2 * self.step_of[fork]

    def add(self, group_id, version):
        self.unread.setdefault(version, []).append(group_id)
        self.added += 1

    def sample(self, current, step):
        """(groups or None, evicted, available)."""
        held = self.batches.get(step, [])
        if held and all(self.age(version, current) <= self.max_age for _, version in held):
            return [group_id for group_id, _ in held], 0, self.k
        for dissolved in sorted(s for s in self.batches if held and s >= step):
            for group_id, version in self.batches.pop(dissolved):
                self.unread.setdefault(version, []).append(group_id)
                self.times[group_id] -= 1
        evicted = 0
        for version in [v for v in self.unread if self.age(v, current) > self.max_age]:
            for group_id in self.unread.pop(version):
                if self.times[group_id]:
                    self.trained += 1
                else:
                    evicted += 1
        self.stale += evicted
        available = sum(len(groups) for groups in self.unread.values())
        if available < self.k:
            return None, evicted, available
        batch = [(g, version) for version in sorted(self.unread) for g in self.unread[version]][: self.k]
        for group_id, version in batch:
            self.unread[version].remove(group_id)
            self.times[group_id] += 1
        self.batches[step] = batch
        return [group_id for group_id, _ in batch], evicted, available

    def acknowledge(self, step):
        settled = 0
        for done in sorted(s for s in self.batches if s <= step):
            for group_id, version in self.batches.pop(done):
                if self.limit is None or self.times[group_id] < self.limit + 1:
                    self.unread.setdefault(version, []).append(group_id)
                else:
                    settled += 1
        self.trained += settled
        return settled

    def sizes(self):
        found = Counter(version for batch in self.batches.values() for _, version in batch)
        for version, groups in self.unread.items():
            found[version] += len(groups)
        return {version: count for version, count in found.items() if count}


def run_against_model(client, keys, *, num_operations, draw, **rules):
    k = draw.choice([1, 2, 3, 5] if rules["max_policy_age"] else [1, 2])  # at age 0 a large batch is seldom complete
    ledger, buffer = make_buffer(client, keys, version=0, k=k, **rules)
    model = Model(k=k, **rules)
    current = newest = step = 0
    for _ in range(num_operations):
        match draw.choices(["add", "sample", "again", "acknowledge", "publish", "fork"], [40, 25, 2, 12, 18, 1])[0]:
            case "add":
                versions = [draw.randint(max(0, newest - 4), newest) for _ in range(draw.randint(1, 3))]
                for group_id, version in zip(file_groups(ledger, versions), versions, strict=True):
                    model.add(group_id, version)
            case "sample":
                step += check_sample(buffer, model, current, step + 1)
            case "again":
                if model.batches:
                    check_sample(buffer, model, current, draw.choice(list(model.batches)))
            case "acknowledge":
                done = draw.randint(max(0, step - 3), step)
                assert buffer.acknowledge(done) == model.acknowledge(done)
            case kind:
                parent = current if kind == "publish" else draw.choice(model.line(current)[:4])
                current = newest = newest + 1
                model.publish(current, parent=parent)
                publish_policy(client, keys, current, parent=parent, step=model.step_of[current])
        counters = ledger.counters()
        assert counters.holds
        found = counters.admitted, counters.trained, counters.dropped.get("stale", 0)
        assert found == (model.added, model.trained, model.stale)
        assert buffer.sizes() == model.sizes()
    return model


def check_sample(buffer, model, current, step):
    sample = buffer.sample(current, step=step)
    wanted, evicted, available = model.sample(current, step)
    assert (sample.groups and ids(sample)) == wanted
    assert (sample.evicted, sample.available) == (evicted, available)
    if wanted is None:
        return False
    assert [group.policy_version for group in sample.groups] == [version for _, version in model.batches[step]]
    return True


FAST = {(0, 0), (1, 1), (2, 0), (3, None)}
EVERY = [
    pytest.param(*rules, marks=() if rules in FAST else pytest.mark.slow)
    for rules in itertools.product([0, 1, 2, 3], [0, 1, None])
]


@pytest.mark.parametrize(("max_policy_age", "max_resample_count"), EVERY)
def test_the_buffer_agrees_with_its_model_over_10000_random_operations(
    client, keys, server_flavours, request, max_policy_age, max_resample_count
):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    num_operations = 840 if request.config.getoption("--slow") else 500  # in each of the twelve cases
    rules = {"max_policy_age": max_policy_age, "max_resample_count": max_resample_count}
    model = run_against_model(client, keys, num_operations=num_operations, draw=random.Random(seed), **rules)
    assert model.trained and model.stale, f"nothing trained or nothing dropped in {num_operations} operations"
