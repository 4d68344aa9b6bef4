"""The ledger on both server flavours: each transition. Random interleavings: tests/test_ledger_interleavings.py."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from builders import (
    admit_one,
    evaluated_payload,
    make_ledger,
    part_payload,
    publish_policy,
    push_group,
    reward_payload,
    rollout_payload,
    started_ledger,
    task_payload,
)
from consistency import PARTS, assert_consistent

from sluice.common.config import EvalDataset
from sluice.common.connections.client import connect
from sluice.common.ledger import evaluations as evaluation
from sluice.common.ledger.replay_buffer import ReplayBuffer

KL = {"loss": {"kl_beta": 0.1}, "num_steps": 1_000_000, "seq_len": 16}


pytestmark = pytest.mark.usefixtures("server_flavours")


def until(condition, *, timeout_s=5.0):
    """Poll a condition; fail when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
    return value


def deadline_in(ledger, group_id, stage):
    """Return the milliseconds until a stage is overdue."""
    seconds, micros = ledger.client.time()
    return ledger.client.zscore(ledger.keys.deadlines, f"{group_id}|{stage}") - (seconds * 1000 + micros // 1000)


def race(url, keys, work, *, num_workers, **sections):
    """Run `work(ledger, number)` in as many threads, each with a connection of its own; return the results."""

    def run(number):
        with connect(url) as connection:
            return work(make_ledger(connection, keys, worker=f"w{number}", **sections), number)

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(run, range(num_workers), timeout=30))


def buffer_of(ledger, *, k=2, max_policy_age=1, **options):
    return ReplayBuffer(ledger, groups_per_step=k, max_policy_age=max_policy_age, **options)


# Admission


@pytest.mark.parametrize(("max_policy_age", "bound"), [(0, 3), (1, 6), (3, 12)])
def test_admission_stops_at_the_in_flight_bound(client, keys, max_policy_age, bound):
    ledger = make_ledger(client, keys, replay_buffer={"batch_size": 3, "max_policy_age": max_policy_age})
    none = ledger.admit(5)
    assert (none.stopped_by, none.policy_version, none.cursors) == ("no_policy", -1, [])
    publish_policy(client, keys, 0)
    first = ledger.admit(2)
    assert (first.stopped_by, first.cursors) == ("max_count", [0, 1])
    rest = ledger.admit(100)
    assert (rest.stopped_by, len(rest.cursors)) == ("no_credit", bound - 2)
    assert ledger.admit(1).cursors == []
    assert ledger.counters().in_flight == ledger.counters().admitted == bound


def test_admission_stops_when_the_run_has_all_the_groups_it_needs(client, keys):
    ledger = started_ledger(
        client, keys, trainer={"num_steps": 3}, replay_buffer={"batch_size": 1, "max_policy_age": 5}
    )
    admission = ledger.admit(100)
    assert (admission.stopped_by, len(admission.cursors)) == ("run_complete", 3)
    ledger.drop(["t1"], reason="prompt_too_long")
    assert ledger.admit(100).cursors == [3], "a dropped group is replaced"


def test_admission_stops_while_groups_hold_too_many_bytes(client, keys):
    ledger = started_ledger(client, keys, replay_buffer={"max_bytes": 100})
    group_id = admit_one(ledger)
    ledger.store(group_id, "task", b"x" * 100)
    assert ledger.admit(1).stopped_by == "max_bytes"
    ledger.drop([group_id], reason="bad_row")
    assert ledger.admit(1).cursors == [1]


def test_a_group_carries_the_lowest_version_that_may_generate_it(client, keys):
    ledger = started_ledger(client, keys)
    push_group(ledger, until="task")
    publish_policy(client, keys, 1)
    group_id = push_group(ledger, until="task")
    first = ledger.claim("t0", "rollout", fields=("min_version", "task"))
    second = ledger.claim(group_id, "rollout", fields=("min_version", "pinned"))
    assert first.fields == {"min_version": b"0", "task": task_payload("t0")}
    assert second.fields == {"min_version": b"1", "pinned": None}


def test_many_admitters_never_repeat_or_skip_a_cursor(client, keys, server_flavours):
    bound = 2 * 300
    admitted = started_ledger(client, keys).counters

    def admit(ledger, number):
        return [cursor for got in iter(lambda: ledger.admit(1 + number % 3).cursors, []) for cursor in got]

    cursors = race(server_flavours, keys, admit, num_workers=8, replay_buffer={"batch_size": 300})
    assert sorted(itertools.chain(*cursors)) == list(range(bound))
    assert sum(bool(mine) for mine in cursors) > 1, "only one thread got through: this tested nothing"
    assert admitted().admitted == bound


# Claims and leases


def test_a_part_is_claimed_by_one_worker_only(client, keys):
    a, b = started_ledger(client, keys, worker="a"), make_ledger(client, keys, worker="b")
    group_id = push_group(a, until="task")
    claim = a.claim(group_id, "rollout", fields=())
    assert claim is not None and claim.attempt == 1
    assert b.claim(group_id, "rollout", fields=()) is None
    assert a.claim(group_id, "rollout", fields=()) is None, "the same message delivered twice to one worker"
    assert b.claim(group_id, "reward", fields=()) is None, "its rollout is not there"
    assert b.claim(group_id, "task", fields=()) is None, "done already"
    assert b.claim("t99", "rollout", fields=()) is None, "never admitted"
    other = push_group(a, until="task")
    replies = [a.scripts("claim", other, "rollout", "w/77", 60_000) for _ in range(3)]
    assert replies == [[1, 1]] * 3, "a claim whose reply was lost spends one attempt"


def test_concurrent_claims_have_one_winner(client, keys, server_flavours):
    ledger = started_ledger(client, keys)
    group_ids = [push_group(ledger, until="task") for _ in range(4)]
    barrier = threading.Barrier(4, timeout=10)

    def work(ledger, _):
        return [g for g in group_ids if barrier.wait() >= 0 and ledger.claim(g, "rollout", fields=())]

    won = race(server_flavours, keys, work, num_workers=4)
    assert sorted(itertools.chain(*won)) == sorted(group_ids)


def test_an_expired_lease_can_be_claimed_by_another_worker(client, keys):
    a, b = started_ledger(client, keys, worker="a"), make_ledger(client, keys, worker="b")
    group_id = push_group(a, until="task")
    first = a.claim(group_id, "rollout", fields=(), lease_s=0.02)
    second = until(lambda: b.claim(group_id, "rollout", fields=()))
    assert (first.attempt, second.attempt) == (1, 2)
    assert a.renew([first]) == [f"{group_id}|rollout"], "the first worker is told that it lost the stage"
    assert a.fail(first, reason="x", detail="") is False and a.release(first) is False
    assert b.renew([second]) == []


def test_a_renewed_lease_is_not_reaped(client, keys):
    ledger = started_ledger(client, keys, lease={"running_s": 60.0})
    group_id = push_group(ledger, until="task")
    claim = ledger.claim(group_id, "rollout", fields=(), lease_s=0.01)
    until(lambda: deadline_in(ledger, group_id, "rollout") <= 0)
    assert ledger.renew([claim]) == []
    assert ledger.reap() == []
    assert 50_000 < deadline_in(ledger, group_id, "rollout") <= 60_000
    assert ledger.renew([]) == []


@pytest.mark.parametrize("late_first", [True, False])
def test_of_a_late_and_a_new_result_exactly_one_is_used(client, keys, late_first):
    slow, fast = started_ledger(client, keys, worker="slow"), make_ledger(client, keys, worker="fast")
    group_id = push_group(slow, until="task")
    slow.claim(group_id, "rollout", fields=(), lease_s=0.01)
    until(lambda: fast.claim(group_id, "rollout", fields=()))
    order = (slow, fast) if late_first else (fast, slow)
    replies = [
        ledger.store(group_id, "rollout", rollout_payload(version=i), version=i, num_tokens=6)
        for i, ledger in enumerate(order)
    ]
    assert replies == [["reward"], None]
    assert client.hget(keys.group(group_id), "rollout") == rollout_payload(version=0), "the first one that arrived"
    assert client.hget(keys.totals, "generated_tokens") == b"6"
    assert fast.counters().refused == 1


@pytest.mark.parametrize("order", [("reward", "reference"), ("reference", "reward")])
def test_a_group_is_ready_when_its_last_part_arrives_whichever_that_is_and_every_part_is_stored_once(
    client, keys, order
):
    ledger = started_ledger(client, keys, trainer=KL)
    group_id = push_group(ledger, until="rollout")
    assert client.zcard(keys.deadlines) == 2
    ledger.store(group_id, order[0], part_payload(group_id, order[0]))
    assert client.exists(keys.stream(0)) == 0
    ledger.store(group_id, order[1], part_payload(group_id, order[1]))
    held = int(client.get(keys.payload_bytes))
    for stage in PARTS:
        version = 0 if stage == "rollout" else None
        assert ledger.store(group_id, stage, part_payload(group_id, stage), version=version) is None
    assert (client.xlen(keys.stream(0)), client.zcard(keys.deadlines)) == (1, 0)
    assert (ledger.counters().refused, int(client.get(keys.payload_bytes))) == (4, held)


# Failure


def test_a_failing_part_is_retried_then_dead_with_reason_and_payload(client, keys):
    ledger = started_ledger(client, keys, lease={"max_attempts": 3})
    group_id = push_group(ledger, until="rollout")
    for attempt in (1, 2):
        claim = ledger.claim(group_id, "reward", fields=("rollout",))
        assert claim.attempt == attempt
        reports = [ledger.fail(claim, reason="RewardError", detail="boom") for _ in range(3)]
        assert reports == [True, False, False], "one attempt, however often it is reported"
        end_wait(ledger, group_id, "reward")
    assert ledger.fail(ledger.claim(group_id, "reward", fields=()), reason="RewardError", detail="last boom") is False
    counters = ledger.counters()
    assert (counters.dead, counters.retried, counters.in_flight) == ({"RewardError": 1}, 2, 0)
    kept = client.hgetall(keys.group(group_id))
    assert (kept[b"stage"], kept[b"dead_reason"], kept[b"dead_detail"]) == (b"dead", b"RewardError", b"last boom")
    assert kept[b"task"] == task_payload(group_id) and kept[b"rollout"] == rollout_payload(version=0)
    assert client.zrange(keys.dead, 0, -1) == [group_id.encode()]
    assert client.zcard(keys.deadlines) == client.scard(keys.credit) == 0
    assert ledger.claim(group_id, "reward", fields=()) is None
    assert ledger.store(group_id, "reward", reward_payload()) is None, "a late result does not bring it back"
    assert_consistent(client, keys)


def end_wait(ledger, group_id, stage):
    """As if the wait before the next attempt, or the lease, were over: the reaper sends the stage again."""
    ledger.client.zadd(ledger.keys.deadlines, {f"{group_id}|{stage}": 1})
    return ledger.reap()


def kill_group(ledger, group_id, stage):
    """Fail a stage until the group is dead."""
    while ledger.fail(ledger.claim(group_id, stage, fields=()), reason="RewardError", detail="boom"):
        end_wait(ledger, group_id, stage)


def test_a_part_that_failed_waits_half_a_second_then_two_then_eight(client, keys):
    ledger = started_ledger(client, keys, lease={"max_attempts": 5})
    group_id = push_group(ledger, until="rollout")
    for wait_ms in (500, 2000, 8000, 8000):
        assert ledger.fail(ledger.claim(group_id, "reward", fields=()), reason="RewardError", detail="boom")
        assert wait_ms - 300 < deadline_in(ledger, group_id, "reward") <= wait_ms
        assert ledger.claim(group_id, "reward", fields=()) is None, "a message that is still in the queue ends no wait"
        assert end_wait(ledger, group_id, "reward") == [(group_id, "reward", "train")]
    counters = ledger.counters()
    assert (counters.retried, counters.resent, counters.dead) == (4, 0, {})
    assert ledger.claim(group_id, "reward", fields=()).attempt == 5


@pytest.mark.parametrize("taken_over", ["reaped", "claimed"])
def test_a_claim_lost_after_progress_spends_no_attempt_and_has_a_bound_of_its_own(client, keys, taken_over):
    lease = {"max_attempts": 2, "max_interruptions": 6}
    ledger = started_ledger(client, keys, lease=lease)
    group_id, poison = push_group(ledger, until="task"), push_group(ledger, until="task")

    def lose(group_id, *, progress):
        claim = ledger.claim(group_id, "rollout", fields=())
        assert ledger.renew([claim], progress={group_id: progress}) == []
        if taken_over == "reaped":
            return end_wait(ledger, group_id, "rollout")
        client.zadd(keys.deadlines, {f"{group_id}|rollout": 1})
        return [claim]

    assert lose(group_id, progress=0) and not ledger.is_last_chance("t99", "rollout")
    for number in range(1, 6):
        if taken_over == "reaped":
            assert ledger.is_last_chance(group_id, "rollout") == (number == 1), "it can run: it runs beside others"
        assert lose(group_id, progress=number)
    if taken_over == "claimed":
        assert ledger.claim(group_id, "rollout", fields=()).attempt == 1
    assert (ledger.counters().interrupted, ledger.counters().retried, ledger.counters().dead) == (5, 1, {})
    if taken_over == "reaped":
        assert ledger.is_last_chance(group_id, "rollout")
        assert lose(group_id, progress=9) == []
        assert lose(poison, progress=0) and lose(poison, progress=0) == []
        assert ledger.counters().dead == {"interrupted": 1, "lease_expired": 1}
        assert b"like 5 claims before it" in client.hget(keys.group(group_id), "dead_detail")
        assert ledger.requeue(group_id) == ["rollout"] and not ledger.is_last_chance(group_id, "rollout")
    assert_consistent(client, keys)


def test_dead_letters_hold_no_room_of_others_and_the_oldest_are_discarded(client, keys):
    room = {"batch_size": 100, "max_bytes": 60_000, "max_dead_bytes": 100_000}
    ledger = started_ledger(client, keys, replay_buffer=room, lease={"max_attempts": 1})
    for _ in range(10):  # of 20 kB each, as long as groups in flight have room
        group_id = admit_one(ledger)
        ledger.store(group_id, "task", b"x" * 20_000)
        kill_group(ledger, group_id, "rollout")
        assert_consistent(client, keys)
    letters = [f"t{number}" for number in range(6, 10)]
    assert sorted(group.decode() for group in client.zrange(keys.dead, 0, -1)) == letters
    assert (ledger.counters().dead, ledger.counters().discarded) == ({"RewardError": 10}, 6)
    assert ledger.requeue("t0") == [] and ledger.requeue("t6") == ["rollout"]
    assert int(client.get(keys.payload_bytes)) == 20_000
    assert ledger.discard(["t7", "t8", "t0"]) == 2 and ledger.discard(["t7"]) == 0
    assert client.zrange(keys.dead, 0, -1) == [b"t9"] and ledger.counters().discarded == 8
    assert_consistent(client, keys)


def test_groups_that_nothing_leads_to_any_more_are_found_and_continued(client, keys):
    ledger = started_ledger(client, keys, replay_buffer={"batch_size": 8})
    buffer = buffer_of(ledger)
    leased = [push_group(ledger), push_group(ledger)]
    assert [group.group_id for group in buffer.sample(0, step=1).groups] == leased
    publish_policy(client, keys, 1)
    ready = [push_group(ledger, version=version) for version in (0, 1)]
    undated, scored, gone = (push_group(ledger, until=stage) for stage in ("task", "rollout", "rollout"))
    assert ledger.recover() == []
    client.delete(keys.stream(0), keys.group(gone))
    client.xgroup_destroy(keys.stream(1), "trainer")
    client.zrem(keys.deadlines, f"{undated}|rollout", f"{gone}|reward")
    assert buffer.sample(1, step=2).available == 0, "a version without its stream has no groups"
    assert sorted(ledger.recover()) == [(undated, "rollout"), (gone, "task")]
    assert ledger.recover() == []
    assert ledger.counters().recovered == 4
    assert ledger.claim(gone, "task", fields=("cursor",)).fields == {"cursor": gone[1:].encode()}
    assert [group.group_id for group in buffer.sample(1, step=2).groups] == ready, "their results were not lost"
    assert buffer.acknowledge(2) == 4
    assert ledger.store(scored, "reward", reward_payload()) == []
    assert (ledger.counters().in_flight, ledger.counters().holds) == (3, True)


def test_a_group_of_an_evaluation_that_redis_has_lost_is_a_dead_letter_of_it(client, keys):
    ledger = started_ledger(client, keys)
    evaluation.request(client, keys, HELDOUT, version=0)
    ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks=eval_tasks(0, 1, modes="g"))
    client.delete(keys.group("e0.heldout.0g"))
    client.zrem(keys.deadlines, "e0.heldout.0g|rollout")
    assert ledger.recover() == []
    assert evaluation.result(client, keys, HELDOUT, version=0).num_dead == 1
    assert ledger.counters("eval").dead == {"lost": 1}
    assert ledger.requeue("e0.heldout.0g") == [], "its prompt is nowhere"
    assert ledger.discard(["e0.heldout.0g"]) == 1
    assert client.get(keys.dead_bytes) == b"0" and ledger.counters("eval").holds


def test_a_requeued_group_whose_results_could_not_be_decoded_is_generated_again(client, keys):
    ledger = started_ledger(client, keys)
    buffer = buffer_of(ledger)
    damaged, sound = push_group(ledger), push_group(ledger)
    client.hset(keys.group(damaged), "reward", b"x" * len(reward_payload()))
    assert buffer.sample(0, step=1).groups is None
    assert ledger.counters().dead == {"undecodable": 1}
    assert ledger.requeue(damaged) == ["rollout"]
    assert_consistent(client, keys)
    ledger.store(damaged, "rollout", rollout_payload(), version=0)
    ledger.store(damaged, "reward", reward_payload())
    assert {group.group_id for group in buffer.sample(0, step=1).groups} == {damaged, sound}


def test_a_requeued_group_gets_fresh_attempts_for_what_it_lacks(client, keys):
    ledger = started_ledger(client, keys, lease={"max_attempts": 2})
    scored, generated = push_group(ledger, until="rollout"), push_group(ledger, until="task")
    kill_group(ledger, scored, "reward")
    kill_group(ledger, generated, "rollout")
    assert ledger.counters().dead == {"RewardError": 2}
    assert ledger.requeue(scored) == ["reward"]
    assert ledger.requeue(generated) == ["rollout"]
    assert ledger.requeue(scored) == [], "it is not dead any more"
    assert ledger.requeue("t99") == []
    counters = ledger.counters()
    assert (counters.dead, counters.in_flight, counters.holds) == ({}, 2, True)
    assert client.scard(keys.credit) == 2
    assert_consistent(client, keys)
    assert ledger.claim(scored, "reward", fields=()).attempt == 1
    assert ledger.store(scored, "reward", reward_payload()) == []
    assert client.hget(keys.group(scored), "stage") == b"ready"
    assert_consistent(client, keys)


def test_a_dead_part_takes_the_others_of_its_group_with_it(client, keys):
    ledger = started_ledger(client, keys, trainer=KL, lease={"max_attempts": 1})
    group_id = push_group(ledger, until="rollout")
    running = ledger.claim(group_id, "reference", fields=())
    ledger.fail(ledger.claim(group_id, "reward", fields=()), reason="x", detail="")
    assert ledger.renew([running]) == [f"{group_id}|reference"]
    assert ledger.store(group_id, "reference", b"late") is None
    assert_consistent(client, keys)


def test_a_released_part_spends_no_attempt(client, keys):
    ledger = started_ledger(client, keys, lease={"max_attempts": 1})
    group_id = push_group(ledger, until="task")
    for _ in range(5):
        claim = ledger.claim(group_id, "rollout", fields=())
        assert claim.attempt == 1
        assert ledger.release(claim) is True
        assert ledger.release(claim) is False, "once"
    assert ledger.counters().retried == 0 and ledger.counters().in_flight == 1


def test_an_unclaimed_part_is_sent_again_with_doubling_intervals(client, keys):
    ledger = started_ledger(client, keys, lease={"queued_s": 20.0})
    group_id = push_group(ledger, until="task")
    assert ledger.reap() == []
    for times in (2, 4, 8, 16, 32, 64, 64):
        client.zadd(keys.deadlines, {f"{group_id}|rollout": 1})  # as if the interval had passed
        assert ledger.reap() == [(group_id, "rollout", "train")]
        assert deadline_in(ledger, group_id, "rollout") == pytest.approx(20_000 * times, abs=1500)
    counters = ledger.counters()
    assert (counters.resent, counters.retried) == (7, 0)
    assert ledger.claim(group_id, "rollout", fields=()).attempt == 1, "no worker held it: no attempt is spent"


def test_an_abandoned_claim_is_retried_then_dead(client, keys):
    ledger = started_ledger(client, keys, worker="rollout@host:7", lease={"running_s": 0.01, "max_attempts": 2})
    group_id = push_group(ledger, until="task")
    ledger.claim(group_id, "rollout", fields=())
    assert until(ledger.reap) == [(group_id, "rollout", "train")]
    assert ledger.claim(group_id, "rollout", fields=()).attempt == 2
    until(lambda: ledger.reap() == [] and ledger.counters().in_flight == 0)
    counters = ledger.counters()
    assert (counters.dead, counters.retried, counters.resent) == ({"lease_expired": 1}, 1, 0)
    assert b"rollout@host:7" in client.hget(keys.group(group_id), "dead_worker")
    assert b"was not renewed" in client.hget(keys.group(group_id), "dead_detail")


def test_a_group_that_dies_of_one_overdue_part_is_not_owed_another_that_is_overdue_too(client, keys):
    lease = {"running_s": 0.001, "queued_s": 0.05, "max_attempts": 1}
    ledger = started_ledger(client, keys, trainer=KL, lease=lease)
    group_id = push_group(ledger, until="rollout")
    assert ledger.claim(group_id, "reward", fields=()) is not None  # overdue first, on its last attempt
    until(lambda: deadline_in(ledger, group_id, "reference") < 0)
    assert ledger.reap() == []
    assert ledger.counters().dead == {"lease_expired": 1}
    assert client.zcard(keys.deadlines) == 0
    assert_consistent(client, keys)


def test_tasks_of_a_dataset_worker_that_died_are_reaped_a_bounded_number_at_a_time_and_prepared_by_another(
    client, keys
):
    ledger = started_ledger(client, keys, replay_buffer={"batch_size": 5}, lease={"running_s": 0.001})
    assert len(ledger.admit(10).cursors) == 10
    until(lambda: max(deadline_in(ledger, f"t{i}", "task") for i in range(10)) <= 0)
    overdue = [ledger.reap(max_count=4) for _ in range(4)]
    assert [len(stages) for stages in overdue] == [4, 4, 2, 0]
    assert {stage for stages in overdue for stage in stages} == {(f"t{i}", "task", "train") for i in range(10)}
    other = make_ledger(client, keys, worker="other")
    claim = other.claim("t3", "task", fields=("cursor",))
    assert claim.fields == {"cursor": b"3"} and claim.attempt == 2
    assert other.store("t3", "task", task_payload("t3")) == ["rollout"]


# Credit and settlement


def test_credit_returns_when_the_version_a_group_helped_to_make_is_published_and_not_before(client, keys):
    ledger = started_ledger(client, keys, replay_buffer={"batch_size": 2, "max_policy_age": 1})
    for _ in range(4):
        push_group(ledger)
    buffer = buffer_of(ledger)
    assert ledger.admit(1).stopped_by == "no_credit"
    assert len(buffer.sample(0, step=1).groups) == 2
    assert ledger.admit(1).stopped_by == "no_credit", "sampled, and not yet published"
    publish_policy(client, keys, 1)
    assert len(ledger.admit(10).cursors) == 2
    buffer.acknowledge(1)
    assert ledger.admit(1).stopped_by == "no_credit", (
        "the checkpoint frees the payload; the credit was returned already"
    )
    assert ledger.counters().trained == 2 and ledger.counters().holds


def test_strictly_on_policy_admits_one_batch_per_version(client, keys):
    ledger = make_ledger(client, keys, replay_buffer={"batch_size": 2, "max_policy_age": 0})
    buffer = buffer_of(ledger, max_policy_age=0)
    for version in range(5):
        publish_policy(client, keys, version)
        admission = ledger.admit(100)
        assert (len(admission.cursors), admission.policy_version) == (2, version)
        group_ids = [push_group(ledger, version=version, group_id=f"t{cursor}") for cursor in admission.cursors]
        assert [group.group_id for group in buffer.sample(version, step=version + 1).groups] == group_ids
    assert buffer.acknowledge(5) == 10
    assert ledger.counters().to_dict()["dropped"] == {}


@pytest.mark.parametrize("stage", ["admitted", "task", "rollout"])
def test_a_dropped_group_is_counted_under_its_reason_and_freed(client, keys, stage):
    ledger = started_ledger(client, keys, trainer=KL)
    group_id = admit_one(ledger)
    if stage != "admitted":
        push_group(ledger, until=stage, group_id=group_id)
    assert ledger.drop([group_id, "t99"], reason="prompt_too_long") == 1
    assert ledger.drop([group_id], reason="bad_row") == 0, "once"
    assert ledger.drop([], reason="bad_row") == 0
    counters = ledger.counters()
    assert (counters.dropped, counters.in_flight, counters.holds) == ({"prompt_too_long": 1}, 0, True)
    assert client.exists(keys.group(group_id)) == 0 and int(client.get(keys.payload_bytes) or 0) == 0
    assert client.scard(keys.credit) == client.zcard(keys.deadlines) == 0
    assert ledger.store(group_id, "rollout", b"late", version=0) is None
    assert_consistent(client, keys)


def test_a_group_in_the_buffer_is_never_dropped_from_outside(client, keys):
    ledger = started_ledger(client, keys)
    buffer = buffer_of(ledger)
    group_ids = [push_group(ledger), push_group(ledger)]
    assert ledger.drop(group_ids, reason="bad_row") == 0
    assert [g.group_id for g in buffer.sample(0, step=1).groups] == group_ids
    assert ledger.drop(group_ids, reason="bad_row") == 0
    assert buffer.acknowledge(1) == 2


def test_an_account_that_does_not_add_up_says_so(client, keys):
    ledger = started_ledger(client, keys)
    admit_one(ledger)
    counters = ledger.counters()
    assert counters.holds and counters.to_dict()["holds"] is True
    assert not replace(counters, in_flight=0).holds
    assert not replace(counters, trained=1).holds


def test_versions_only_grow_and_an_older_incarnation_is_refused(client, keys):
    assert publish_policy(client, keys, 3, parent=-1, step=0) == 1
    assert publish_policy(client, keys, 3) == 0 and publish_policy(client, keys, 2) == 0
    client.hset(keys.run_record, "incarnation", 2)
    assert publish_policy(client, keys, 4, incarnation=1) == -1
    assert publish_policy(client, keys, 4, incarnation=2) == 1
    assert client.hget(keys.policy, "version") == b"4"
    assert client.hkeys(keys.lineage) == [b"3", b"4"]


# Evaluation


HELDOUT = EvalDataset.model_validate({"name": "heldout", "dataset": {"path": "x"}, "num_samples": 4, "function": "M"})


def eval_tasks(version, prompts, *, modes="gs"):
    return {f"e{version}.heldout.{i}{m}": task_payload(f"e{i}{m}") for i in range(prompts) for m in modes}


def test_an_evaluation_is_scored_and_never_enters_the_buffer(client, keys):
    ledger = started_ledger(client, keys, version=1, trainer=KL)
    evaluation.request(client, keys, HELDOUT, version=1)
    assert ledger.admit_eval("1.heldout", dataset="heldout", version=1, tasks={}) == []
    assert evaluation.pending(client, keys) == [], "without a usable prompt it is finished at once"
    assert evaluation.result(client, keys, HELDOUT, version=1).num_prompts == 0
    evaluation.request(client, keys, HELDOUT, version=0)
    evaluation.request(client, keys, HELDOUT, version=0)
    assert evaluation.pending(client, keys) == ["0.heldout"]
    tasks = eval_tasks(0, 2)
    begun = [ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks=tasks) for _ in range(2)]
    assert begun == [[(group, "rollout") for group in tasks], []], "nothing when the message comes twice"
    rewards = {"0g": (1.0,), "1g": (0.2,), "0s": (1.0, 0.0, None, 0.9), "1s": (0.0,) * 4}
    for group_id, scores in ((f"e0.heldout.{name}", scores) for name, scores in rewards.items()):
        assert evaluation.result(client, keys, HELDOUT, version=0) is None
        claim = ledger.claim(group_id, "rollout", fields=("pinned", "min_version", "task"))
        assert claim.fields == {"pinned": b"0", "min_version": b"0", "task": tasks[group_id]}
        assert ledger.store(group_id, "rollout", rollout_payload(), version=0) == ["reward"], "no reference stage"
        assert ledger.store(group_id, "reward", evaluated_payload(rewards=scores, name="M")) == []
    result = evaluation.result(client, keys, HELDOUT, version=0)
    assert (result.num_prompts, result.num_dead) == (2, 0)
    assert result.scores["pass@1"] == 0.5, "greedy: one of two prompts"
    assert result.scores["pass@4"] == 0.5, "of four samples one is right for the first prompt, none for the second"
    assert evaluation.pending(client, keys) == []
    counters = ledger.counters("eval")
    assert (counters.scored, counters.in_flight, counters.holds) == (4, 0, True)
    assert ledger.counters("train").admitted == 0
    assert client.zcard(keys.versions) == 0 and int(client.get(keys.payload_bytes)) == 0
    evaluation.request(client, keys, HELDOUT, version=0)
    assert evaluation.pending(client, keys) == [], "it is known already"
    assert_consistent(client, keys)


def test_an_evaluation_ends_although_one_of_its_groups_died_and_waits_for_a_requeued_one(client, keys):
    ledger = started_ledger(client, keys, lease={"max_attempts": 1})
    evaluation.request(client, keys, HELDOUT, version=0)
    ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks=eval_tasks(0, 2, modes="g"))
    kill_group(ledger, "e0.heldout.0g", "rollout")

    def score(group_id):
        ledger.store(group_id, "rollout", rollout_payload(), version=0)
        ledger.store(group_id, "reward", evaluated_payload(rewards=(1.0,), name="M"))

    score("e0.heldout.1g")
    result = evaluation.result(client, keys, HELDOUT, version=0)
    assert (result.num_prompts, result.num_dead, result.scores["pass@1"]) == (1, 1, 1.0)
    assert evaluation.pending(client, keys) == []
    assert ledger.counters("eval").to_dict()["dead"] == {"RewardError": 1}
    assert_consistent(client, keys)
    assert ledger.requeue("e0.heldout.0g") == ["rollout"]
    assert client.hgetall(keys.evaluations) == {b"0.heldout": b"0"}, "its version is kept again"
    assert ledger.counters("eval").holds
    score("e0.heldout.0g")
    assert (ledger.counters("eval").scored, evaluation.pending(client, keys)) == (2, [])
    assert evaluation.result(client, keys, HELDOUT, version=0).num_prompts == 2
