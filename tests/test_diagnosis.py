"""Every cause of a stall is named, from hand-made heartbeats, queues and ledgers in a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import admit_one, make_config, make_ledger, publish_policy, push_group, reward_payload
from harness import wait_for

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.diagnosis import Cause, alarms, diagnose
from sluice.common.monitoring.heartbeats import SILENT_AFTER_S, read_heartbeats, send_heartbeat
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.policies.manifest import Manifest
from sluice.common.run import Run, create_run
from sluice.common.serialization import encode
from sluice.dashboard.run_state import collect_status
from sluice.scripts.launcher.redis_server import start_server


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Run:
    return new_run(client, keys, tmp_path)


def new_run(client: redis.Redis, keys: Keys, folder: Path) -> Run:
    config = make_config(trainer={"loss": {"kl_beta": 0.0}}, policy_store={"pickup_alarm_s": 5.0})
    made = create_run(client, keys.run, config, assets={}, folder=str(folder))
    publish_policy(client, keys, 0)
    return made


def staff(client: redis.Redis, keys: Keys, *, without: str = "", **stats: Any) -> None:
    """One live worker on every queue; `rollout={...}` adds to the stats of that role."""
    defaults: dict[str, dict[str, Any]] = {
        "dataset": {"stopped_by": "no_credit"},
        "rollout": {"version": 0, "digest": ""},
        "reward": {},
    }
    for role, own in defaults.items():
        if role != without:
            send_heartbeat(
                client, keys, f"{role}@host:1", {"role": role, "running": 1, "alarm": "", **own, **stats.get(role, {})}
            )


def silence_for(client: redis.Redis, keys: Keys, process: str, *, seconds: float) -> None:
    client.zincrby(keys.processes, -1000 * seconds, process)


def queue_up(client: redis.Redis, keys: Keys, queue: str, num_messages: int) -> None:
    client.rpush(keys.celery_prefix + queue, *(f"message {i}" for i in range(num_messages)))


def test_a_queue_without_workers_is_named(client: redis.Redis, keys: Keys, run: Run) -> None:
    staff(client, keys, without="reward")
    queue_up(client, keys, "reward", 3)
    assert diagnose(client, run) == Cause("no_workers", "0 workers on `reward`, 3 messages queued")


def test_a_process_that_stopped_beating_is_silent_within_five_seconds(
    client: redis.Redis, keys: Keys, run: Run
) -> None:
    assert SILENT_AFTER_S < 5
    staff(client, keys)
    assert diagnose(client, run).kind == "admission"
    silence_for(client, keys, "rollout@host:1", seconds=6.0)
    expected = Cause("silent_worker", "rollout@host:1 has been silent for 6 s: dead, stopped or cut off")
    assert diagnose(client, run) == expected
    assert expected in alarms(client, run)
    staff(client, keys)
    assert alarms(client, run) == []


def test_heartbeats_carry_the_age_of_the_last_beat_by_redis_clock(client: redis.Redis, keys: Keys, run: Run) -> None:
    staff(client, keys)
    assert all(0 <= stats["silent_s"] < 2 for stats in read_heartbeats(client, keys).values())
    silence_for(client, keys, "reward@host:1", seconds=8.0)
    assert 8 <= read_heartbeats(client, keys)["reward@host:1"]["silent_s"] < 10


def test_what_a_process_says_of_itself_comes_first(client: redis.Redis, keys: Keys, run: Run) -> None:
    staff(client, keys, rollout={"alarm": "still serves version 0: tensor w does not match its digest"})
    found = diagnose(client, run)
    assert found == Cause("alarm", "rollout@host:1: still serves version 0: tensor w does not match its digest")
    assert found in alarms(client, run)


def test_a_policy_that_nobody_picks_up_is_named_after_its_bound(client: redis.Redis, keys: Keys, run: Run) -> None:
    publish_policy(client, keys, 1)
    staff(client, keys)
    assert alarms(client, run) == [], "workers have pickup_alarm_s to fetch it"
    client.hincrbyfloat(keys.policy, "published_at", -6)
    found = diagnose(client, run)
    assert found.kind == "not_picked_up"
    assert found.text.startswith("no rollout worker has picked up policy version 1, published 6 s ago")
    assert found.text.endswith("the newest that one serves is 0")
    assert found.kind in {alarm.kind for alarm in alarms(client, run)}
    staff(client, keys, rollout={"version": 1})
    assert alarms(client, run) == []
    silence_for(client, keys, "rollout@host:1", seconds=6.0)
    assert "not_picked_up" in {alarm.kind for alarm in alarms(client, run)}, "a silent worker serves no request"


def test_a_worker_that_serves_other_weights_than_the_published_raises_an_alarm(
    client: redis.Redis, keys: Keys, run: Run
) -> None:
    manifest = Manifest(version=0, step=0, incarnation=1, parent=-1, num_bytes=1, digest="a" * 64, tensors={})
    wire = {name: getattr(manifest, name) for name in Manifest.__slots__}
    client.hset(keys.manifests, "0", encode(wire))
    staff(client, keys, rollout={"digest": "a" * 12})
    assert alarms(client, run) == []
    staff(client, keys, rollout={"digest": "b" * 12})
    (found,) = alarms(client, run)
    assert found.kind == "digest_mismatch"
    assert "rollout@host:1 serves policy version 0 with digest bbbbbbbbbbbb" in found.text


def test_a_sampler_that_computes_other_logprobs_than_the_trainer_raises_an_alarm(
    client: redis.Redis, keys: Keys, run: Run
) -> None:
    staff(client, keys, rollout={"mismatch": 0.9e-3})
    assert alarms(client, run) == [], "float32 may differ by as much"
    staff(client, keys, rollout={"mismatch": 0.2})
    (found,) = alarms(client, run)
    assert found.kind == "sampler_mismatch"
    assert "rollout@host:1 serves policy version 0, but its logprobs are 0.2 nats from the trainer's" in found.text
    staff(client, keys, rollout={"mismatch": 0.0, "cache_mismatch": 3.0})
    (found,) = alarms(client, run)
    assert found.kind == "sampler_mismatch"
    assert "3 nats from its own fresh forward pass" in found.text


def test_without_groups_in_flight_the_admission_is_named(client: redis.Redis, keys: Keys, run: Run) -> None:
    reason = "redis_memory: 870 MiB of maxmemory 1000 MiB used"
    staff(client, keys, dataset={"stopped_by": reason})
    assert diagnose(client, run) == Cause("admission", f"no group is in flight; admission stopped by {reason}")
    admit_one(make_ledger(client, keys))
    assert diagnose(client, run).kind == "working"
    assert reason in diagnose(client, run).text


def test_groups_dropped_as_stale_since_the_last_step_are_named(client: redis.Redis, keys: Keys, run: Run) -> None:
    ledger = make_ledger(client, keys)
    staff(client, keys, rollout={"version": 9})
    push_group(ledger)
    write_metrics(client, keys, {"step": 1, "staleness/dropped": 0}, max_length=100)
    for version in (1, 2, 3):
        publish_policy(client, keys, version)
    buffer = ReplayBuffer(ledger, groups_per_step=2, max_policy_age=1, max_resample_count=0)
    assert buffer.sample(3, step=1).evicted == 1
    admit_one(ledger)
    found = diagnose(client, run)
    assert found.kind == "stale_drops"
    assert found.text.startswith("1 groups were dropped as stale since step 1")
    write_metrics(client, keys, {"step": 2, "staleness/dropped": 1}, max_length=100)
    assert diagnose(client, run).kind == "working", "those of earlier steps explain nothing"


def test_a_batch_worth_of_groups_dropped_for_equal_rewards_is_named(client: redis.Redis, keys: Keys, run: Run) -> None:
    ledger = make_ledger(client, keys)
    staff(client, keys)
    write_metrics(client, keys, {"step": 4, "filter/dropped": 0}, max_length=100)
    for num_dropped in (1, 2):
        assert diagnose(client, run).kind != "zero_variance", "a group now and then explains nothing"
        ledger.store(push_group(ledger, until="rollout"), "reward", reward_payload(), is_zero_variance=True)
        assert ledger.counters().dropped == {"zero_variance": num_dropped}
    admit_one(ledger)
    expected = "2 groups were dropped for equal rewards since step 4; 18 more may be, then they are kept; 1 in flight"
    assert diagnose(client, run) == Cause("zero_variance", expected)
    write_metrics(client, keys, {"step": 5, "filter/dropped": 2}, max_length=100)
    assert diagnose(client, run).kind == "working"


def test_a_queue_that_holds_most_of_what_is_in_flight_is_backed_up(client: redis.Redis, keys: Keys, run: Run) -> None:
    ledger = make_ledger(client, keys)
    staff(client, keys)
    for _ in range(4):
        admit_one(ledger)
    assert diagnose(client, run).kind == "working"
    queue_up(client, keys, "reward", 3)
    found = diagnose(client, run)
    assert found.kind == "queue_backed_up"
    assert found.text.startswith("queue `reward` is backed up: 3 messages queued for 1 workers; 4 groups in flight")


def test_broker_messages_that_were_set_aside_raise_an_alarm(client: redis.Redis, keys: Keys, run: Run) -> None:
    staff(client, keys)
    queue_up(client, keys, "rejected", 2)
    assert [alarm.kind for alarm in alarms(client, run)] == ["rejected_messages"]


def test_status_shows_cause_kind_and_alarms(client: redis.Redis, keys: Keys, run: Run) -> None:
    client.hset(keys.run_record, "status", "running")
    staff(client, keys, without="rollout", reward={"alarm": "cannot score"})
    assert collect_status(client, run)["stall_kind"] == "no_trainer"
    send_heartbeat(client, keys, "trainer@host:1", {"role": "trainer", "waiting_s": 6.0, "alarm": ""})
    shown = collect_status(client, run)
    assert (shown["stall_kind"], shown["alarms"]) == ("no_workers", ["reward@host:1: cannot score"])
    assert json.dumps(shown)
    send_heartbeat(client, keys, "trainer@host:1", {"role": "trainer", "waiting_s": 0.0, "alarm": ""})
    assert collect_status(client, run)["stalled_by"] is None
    silence_for(client, keys, "trainer@host:1", seconds=6.0)
    assert collect_status(client, run)["stall_kind"] == "silent_trainer"


# Servers that are full or away: each test has one of its own.

Servers = Callable[[], tuple[redis.Redis, Run, Any]]


@pytest.fixture
def own_server(tmp_path: Path, keys: Keys) -> Iterator[tuple[redis.Redis, Run, Any]]:
    server = start_server(tmp_path / "own")
    client = connect(server.url, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1), socket_timeout=2.0)
    yield client, new_run(client, keys, tmp_path), server
    client.close()
    server.stop()


def test_a_full_redis_is_named_and_heartbeats_go_on(own_server: tuple[redis.Redis, Run, Any]) -> None:
    client, run, _ = own_server
    staff(client, run.keys)
    client.set("sluice:filler", bytes(20 << 20))

    def is_nearly_full() -> bool:  # memory use falls when the append-only file is written
        client.config_set("maxmemory", int(int(client.info("memory")["used_memory"]) * 1.05))
        return [alarm.text.startswith("Redis is nearly full") for alarm in alarms(client, run)] == [True]

    wait_for(is_nearly_full, timeout=10, what="a warning")
    staff(client, run.keys)  # again: on a busy machine the first heartbeats have expired by now
    assert diagnose(client, run).kind == "admission"
    client.config_set("maxmemory", int(int(client.info("memory")["used_memory"]) * 0.8))
    with pytest.raises(redis.OutOfMemoryError):
        client.set("sluice:probe", "x")
    send_heartbeat(client, run.keys, "rollout@host:2", {"role": "rollout", "running": 0, "version": 0})
    assert "rollout@host:2" in read_heartbeats(client, run.keys)
    found = diagnose(client, run)
    assert found.kind == "redis_full"
    assert "of maxmemory" in found.text
    assert found in alarms(client, run)


def test_a_redis_that_is_away_is_a_cause_and_no_exception(own_server: tuple[redis.Redis, Run, Any]) -> None:
    client, run, server = own_server
    staff(client, run.keys)
    server.stop()
    assert diagnose(client, run).kind == "redis_unreachable"
    assert [alarm.kind for alarm in alarms(client, run)] == ["redis_unreachable"]
