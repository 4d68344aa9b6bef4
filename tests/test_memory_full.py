"""Redis at `maxmemory` (noeviction): what brings payloads waits and says so, everything else goes on, nothing is half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from builders import admit_one, make_ledger, publish_policy, push_group, rollout_payload, task_payload
from harness import (
    SMALL,
    assert_trained_once,
    counters_of,
    create_run,
    metrics_of,
    trainer,
    wait_for,
    wait_for_stall,
    workers,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.monitoring.metric_stream import last_metrics, write_metrics
from sluice.scripts.launcher.redis_server import EmbeddedServer


def fill_up(client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) // 2)  # freeing a little does not help


def contents(client: redis.Redis) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.scan_iter(count=1000)}


@pytest.fixture
def client(server_flavours: str):
    connection = connect(server_flavours, retry=Retry(NoBackoff(), 0))  # type: ignore[arg-type]
    yield connection
    connection.config_set("maxmemory", 0)
    connection.close()


def test_at_maxmemory_payloads_are_refused_whole_and_all_else_goes_on(client: redis.Redis, keys: Keys) -> None:
    publish_policy(client, keys, 0)
    ledger = make_ledger(client, keys, replay_buffer={"batch_size": 4, "max_policy_age": 3})
    buffer = ReplayBuffer(ledger, groups_per_step=2, max_policy_age=3)
    ready = [push_group(ledger) for _ in range(2)]
    failing, working, dropped = (push_group(ledger, until="task") for _ in range(3))
    untouched = admit_one(ledger)
    claim = ledger.claim(failing, "rollout", fields=())
    assert claim is not None
    fill_up(client)
    before = contents(client)
    for attempt in (
        lambda: ledger.store(untouched, "task", task_payload(untouched)),
        lambda: ledger.store(working, "rollout", rollout_payload(), version=0),
        lambda: ledger.claim(working, "rollout", fields=()),
        lambda: ledger.reap(),
        lambda: ledger.recover(),
        lambda: ledger.admit(1),
        lambda: ledger.admit_eval("0.heldout", dataset="heldout", version=0, tasks={"e0.heldout.0g": b"task"}),
    ):
        with pytest.raises(redis.OutOfMemoryError):
            attempt()
    assert contents(client) == before, "a refused script must not leave half of its work"

    assert ledger.renew([claim]) == []
    assert ledger.fail(claim, reason="EngineError", detail="it broke")
    assert ledger.drop([dropped], reason="bad_row") == 1
    sample = buffer.sample(0, step=1)
    assert sample.groups is not None and sorted(group.group_id for group in sample.groups) == sorted(ready)
    assert publish_policy(client, keys, 1, step=1) == 1
    write_metrics(client, keys, {"step": 1.0}, max_length=10)
    assert last_metrics(client, keys) == {"step": 1.0}
    assert buffer.acknowledge(1) == 2, "this is what frees memory again"
    counters = ledger.counters()
    assert (counters.trained, counters.dropped, counters.in_flight, counters.holds) == (2, {"bad_row": 1}, 3, True)
    client.config_set("maxmemory", 0)
    assert ledger.store(working, "rollout", rollout_payload(), version=0) == ["reward"]


def test_a_run_pauses_at_maxmemory_names_the_cause_and_goes_on(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    settings = {"trainer__num_steps": 24, "trainer__stall_report_s": 1.0, "checkpoint__every_steps": 4, **SMALL}
    env = create_run(tmp_path, own_redis.url, **settings)  # type: ignore[arg-type]
    run_folder = tmp_path / "runs" / "roles"
    client = connect(own_redis.url)
    with workers(tmp_path, env) as processes, trainer(tmp_path, env) as daemon:
        wait_for(lambda: len(metrics_of(run_folder)) >= 4, timeout=90, what="four steps")
        fill_up(client)
        steps = len(metrics_of(run_folder))
        wait_for_stall(tmp_path, env, "MiB of maxmemory", *processes, daemon)
        assert len(metrics_of(run_folder)) <= steps + 4, "it does not move, but for the batches that were ready"
        client.config_set("maxmemory", 0)
        assert daemon.wait(240) == 0
    client.close()
    counters = counters_of(env)
    assert (counters.holds, counters.trained, counters.in_flight, counters.dead) == (True, 24 * 4, 0, {})
    assert_trained_once(run_folder, 24, groups_per_step=4)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "is out of memory (maxmemory): writing pauses" in logs
