"""Group filtering: groups of equal rewards leave, others take their place, the books balance and nobody starves."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from builders import (
    admit_one,
    for_each,
    make_config,
    publish_policy,
    push_group,
    reference_payload,
    reward_payload,
    rollout_payload,
    started_ledger,
    task_payload,
)
from consistency import assert_consistent
from harness import SMALL, counters_of, metrics_of, trainer, wait_for, worker, workers
from harness import create_run as start_run

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.run import Run, create_run
from sluice.common.types import has_reward_variance
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.trainer.step_metrics import FlowMeter, Reporter

K = 2
EQUAL = reward_payload(rewards=(1.0, 1.0))


pytestmark = pytest.mark.usefixtures("server_flavours")


def filtering(client, keys, *, max_refill=10, max_policy_age=1, **trainer):
    """A ledger of a run with policy 0 and a filter, and its buffer."""
    trainer = {"filter_zero_variance": True, "max_refill": max_refill, **trainer}
    replay_buffer = {"batch_size": K, "max_policy_age": max_policy_age}
    ledger = started_ledger(client, keys, trainer=trainer, replay_buffer=replay_buffer)
    return ledger, ReplayBuffer(ledger, groups_per_step=K, max_policy_age=max_policy_age)


def score_equal(ledger, group_id=None):
    """A group whose rewards turn out equal; True: it was dropped."""
    group_id = group_id or push_group(ledger, until="rollout")
    ledger.store(group_id, "reward", EQUAL, is_zero_variance=True)
    return not ledger.client.sismember(ledger.keys.live("train"), group_id)


@for_each(
    ("rewards", "expected"),
    [
        ([1.0, 1.0, 1.0], False),
        ([0.0, -0.0], False),
        ([1.0, 0.0, 1.0], True),
        ([None, 1.0, 1.0], False),
        ([None, 1.0, 0.0], True),
        ([None, 1.0], False),
        ([None, None], False),
        ([0.1 + 0.2, 0.3], False),  # equal as float32, in which the trainer finds an advantage of 0
    ],
)
def test_a_group_has_a_preference_when_two_scorable_rewards_differ(rewards, expected):
    assert has_reward_variance(rewards) is expected


def test_a_group_of_equal_rewards_is_dropped_when_its_scores_arrive_and_its_credit_returns(client, keys):
    ledger, buffer = filtering(client, keys)
    group_ids = [push_group(ledger, until="rollout") for _ in range(4)]
    assert ledger.admit(1).stopped_by == "no_credit"
    assert score_equal(ledger, group_ids[0])
    counters = ledger.counters()
    assert (counters.dropped, counters.in_flight, counters.holds) == ({"zero_variance": 1}, 3, True)
    assert client.exists(keys.group(group_ids[0])) == 0
    assert ledger.admit(10).cursors == [4], "another prompt in its place"
    ledger.store(group_ids[1], "reward", reward_payload())
    ledger.store(group_ids[2], "reward", reward_payload())
    assert [group.group_id for group in buffer.sample(0, step=1).groups] == group_ids[1:3]
    assert_consistent(client, keys)


def test_a_repeated_or_late_call_after_the_drop_changes_nothing(client, keys):
    ledger, _ = filtering(client, keys)
    slow, group_id = push_group(ledger, until="rollout"), push_group(ledger, until="rollout")
    claim = ledger.claim(group_id, "reward", fields=())
    assert score_equal(ledger, group_id)
    for _ in range(2):
        assert ledger.store(group_id, "reward", EQUAL, is_zero_variance=True) is None
    assert ledger.store(group_id, "reward", reward_payload()) is None, "an attempt that scores otherwise is too late"
    assert ledger.fail(claim, reason="x", detail="") is False and ledger.release(claim) is False
    assert ledger.claim(group_id, "reward", fields=()) is None
    assert ledger.drop([group_id], reason="bad_row") == 0
    counters = ledger.counters()
    assert (counters.dropped, counters.refused, counters.in_flight) == ({"zero_variance": 1}, 3, 1)
    assert client.get(keys.filtered) == b"1"
    ledger.store(slow, "reward", reward_payload())
    assert ledger.store(slow, "reward", EQUAL, is_zero_variance=True) is None, "the first result of a part wins"
    assert client.hget(keys.group(slow), "stage") == b"ready"
    assert_consistent(client, keys)


@pytest.mark.parametrize("reference_first", [True, False])
def test_the_reference_part_of_a_dropped_group_is_not_awaited(client, keys, reference_first):
    ledger, _ = filtering(client, keys, loss={"kl_beta": 0.1})
    group_id = push_group(ledger, until="rollout")
    running = ledger.claim(group_id, "reference", fields=())
    if reference_first:
        ledger.store(group_id, "reference", reference_payload())
    assert score_equal(ledger, group_id)
    if not reference_first:
        assert ledger.renew([running]) == [f"{group_id}|reference"]
        assert ledger.store(group_id, "reference", reference_payload()) is None
    assert int(client.get(keys.payload_bytes)) == client.zcard(keys.deadlines) == client.scard(keys.credit) == 0
    assert_consistent(client, keys)


def test_evaluations_are_never_filtered(client, keys):
    ledger, _ = filtering(client, keys)
    client.hset(keys.evaluations, "0.x", 0)
    ledger.admit_eval("0.x", dataset="x", version=0, tasks={"e0.x.0g": task_payload("e0.x.0g")})
    ledger.store("e0.x.0g", "rollout", rollout_payload(), version=0)
    assert ledger.store("e0.x.0g", "reward", EQUAL, is_zero_variance=True) == []
    counters = ledger.counters("eval")
    assert (counters.scored, counters.dropped, counters.kept_for_bound) == (1, {}, 0)


def test_groups_are_kept_over_the_bound_until_the_batch_is_taken(client, keys):
    ledger, buffer = filtering(client, keys, max_refill=3)
    assert buffer.sample(0, step=1).groups is None
    assert [score_equal(ledger) for _ in range(3 * K + K - 1)] == [True] * 3 * K + [False] * (K - 1)
    assert client.llen(keys.wake) == 0
    assert not score_equal(ledger)
    assert buffer.wait(1.0), "a group that is kept wakes the trainer"
    counters = ledger.counters()
    assert (counters.dropped, counters.kept_for_bound) == ({"zero_variance": 3 * K}, K)
    batch = buffer.sample(0, step=1).groups
    assert [[e.reward for e in group.episodes] for group in batch] == [[1.0, 1.0]] * K
    assert [group.group_id for group in buffer.sample(0, step=1).groups] == [group.group_id for group in batch]
    publish_policy(client, keys, 1)
    assert score_equal(ledger), "and for the next batch they are dropped again"
    assert client.get(keys.filtered) == b"1"
    assert_consistent(client, keys)


def test_a_batch_that_nobody_takes_raises_the_bound_once_and_waste_ends(client, keys):
    """A trainer that is slow or away: what is ready is not held against the filter, but drops do not go on for ever."""
    ledger, buffer = filtering(client, keys, max_refill=2)
    assert score_equal(ledger)
    for _ in range(K):
        push_group(ledger)
    assert [score_equal(ledger) for _ in range(4 * K + 1)] == [True] * (4 * K - 1) + [False] * 2
    assert len(buffer.sample(0, step=1).groups) == K
    assert client.exists(keys.filtered) == 0
    assert ledger.counters().kept_for_bound == 2


def test_strictly_on_policy_batches_are_refilled_under_the_same_version(client, keys):
    ledger, buffer = filtering(client, keys, max_policy_age=0)
    for version in range(3):
        publish_policy(client, keys, version)
        for _ in range(5):  # a batch's worth of groups is in flight all the time
            group_ids = [push_group(ledger, version=version, until="rollout") for _ in range(K)]
            assert ledger.admit(1).stopped_by == "no_credit"
            assert all(score_equal(ledger, group_id) for group_id in group_ids)
        for _ in range(K):
            push_group(ledger, version=version)
        assert len(buffer.sample(version, step=version + 1).groups) == K
    assert buffer.acknowledge(3) == 3 * K
    counters = ledger.counters()
    assert (counters.dropped, counters.trained, counters.in_flight) == ({"zero_variance": 3 * 5 * K}, 3 * K, 0)
    assert counters.holds


def test_drops_are_reported_in_all_and_per_step_where_there_is_a_filter(client, keys, tmp_path):
    ledger, buffer = filtering(client, keys, max_refill=1)
    run, without = (
        Run(name=keys.run, keys=keys, config=config, assets={}, folder=str(tmp_path))
        for config in (ledger.config, make_config())
    )
    assert not [name for name in FlowMeter(client, without).metrics(step_s=1.0) if name.startswith("filter/")]
    reporter = Reporter(client, run)
    seen = []
    for step, num_equal in [(1, 3), (2, 0), (3, 2)]:
        for _ in range(num_equal):
            score_equal(ledger)
        metrics = FlowMeter(client, run).metrics(step_s=1.0)
        seen.append([metrics[f"filter/{name}"] for name in ("dropped", "dropped_in_step", "kept_for_bound")])
        reporter.report(step, step, metrics)
        for _ in range(K):
            push_group(ledger)
        buffer.sample(0, step=step)
        publish_policy(client, keys, step)
    assert seen == [[2, 2, 1], [2, 0, 1], [4, 2, 1]]


REWARD = """
def mostly_equal(prompts, completions, **kwargs):
    # of three prompts in four all completions are equally good
    differs = sum(map(ord, prompts[0])) % 4 == 0
    return [float(differs and i % 2) for i in range(len(completions))]


def by_target(prompts, completions, target, **kwargs):
    return {"equal": [1.0, 1.0], "one": [None, 1.0], "differ": [0.0, 1.0]}[target[0]]
"""


def test_a_reward_worker_drops_what_teaches_nothing_and_asks_for_other_prompts(
    client: redis.Redis, keys: Keys, server_flavours: str, tmp_path: Path
) -> None:
    (tmp_path / "scores.py").write_text(REWARD)
    config = make_config(
        reward={"functions": [{"function": f"{tmp_path / 'scores.py'}:by_target"}]},
        trainer={"filter_zero_variance": True},
        lease={"running_s": 60.0, "queued_s": 60.0},
        replay_buffer={"batch_size": 4, "max_policy_age": 1},
        evaluation={"datasets": [{"name": "x", "dataset": {"path": "x"}}]},
    )
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    ledger, app = Ledger(client, keys, config), make_app(keys.run, url=server_flavours)
    client.hset(keys.evaluations, "0.x", 0)
    ledger.admit_eval("0.x", dataset="x", version=0, tasks={"e0.x.0s": task_payload("e0.x.0s", target="equal")})
    targets = {admit_one(ledger): target for target in ("equal", "one", "differ", "equal")}
    for group_id, target in targets.items():
        ledger.store(group_id, "task", task_payload(group_id, target=target))
    for group_id in (*targets, "e0.x.0s"):
        ledger.store(group_id, "rollout", rollout_payload(), version=0)
        send_stage(app, group_id, "reward")
    with worker("reward", cwd=tmp_path, SLUICE_REDIS_URL=server_flavours, SLUICE_RUN=keys.run):
        asked_for = lambda: client.llen(keys.celery_prefix + "dataset")  # noqa: E731
        wait_for(lambda: asked_for() == 3 and ledger.counters("eval").scored, timeout=60, what="every group's scores")
    counters = ledger.counters()
    assert (counters.dropped, counters.in_flight, counters.holds) == ({"zero_variance": 3}, 1, True)
    assert [group for group, target in targets.items() if client.exists(keys.group(group))] == ["t2"]
    assert client.xlen(keys.stream(0)) == 1


def test_a_run_of_mostly_equal_groups_trains_on_those_that_differ(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    (tmp_path / "scores.py").write_text(REWARD)
    steps, k = 6, 4
    settings = SMALL | {
        "trainer__num_steps": steps,
        "trainer__filter_zero_variance": True,
        "replay_buffer__max_policy_age": 0,
    }
    env = start_run(
        tmp_path,
        own_redis.url,
        **settings,
        reward={"functions": [{"function": f"{tmp_path / 'scores.py'}:mostly_equal"}]},
    )
    with workers(tmp_path, env), trainer(tmp_path, env) as daemon:
        assert daemon.wait(240) == 0
    counters = counters_of(env)
    assert counters.holds and (counters.trained, counters.in_flight, counters.dead) == (steps * k, 0, {})
    assert counters.dropped.keys() == {"zero_variance"}, "none is stale: refills carry the version of their batch"
    assert counters.dropped["zero_variance"] > steps * k
    metrics = metrics_of(tmp_path / "runs" / env["SLUICE_RUN"])
    assert [line["frac_reward_zero_std"] for line in metrics] == [0.0] * steps
    assert all(line["filter/dropped_in_step"] > 0 and line["filter/kept_for_bound"] == 0 for line in metrics)
