"""Depth and oldest age of Celery's queues, from messages that Celery itself sent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from builders import make_config

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.keys import Keys
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.queues import read_queues
from sluice.common.run import RunRecord, create_run
from sluice.dashboard.run_state import collect_status
from sluice.trainer.step_metrics import FlowMeter


def test_the_oldest_message_of_a_queue_is_the_one_sent_first(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    app, now = make_app(keys.run), time.time()
    for group, sent_s_ago in (("t0", 30.0), ("t1", 5.0)):
        monkeypatch.setattr("sluice.common.connections.broker.time.time", lambda ago=sent_s_ago: now - ago)
        send_stage(app, group, "rollout")
    monkeypatch.undo()
    found = read_queues(client, run, ("rollout", "reward"))
    assert found["rollout"].depth == 2
    assert 30 <= found["rollout"].oldest_age_s < 40
    assert (found["reward"].depth, found["reward"].oldest_age_s) == (0, 0.0)
    status = collect_status(client, run)
    assert status["queues"]["rollout"] == 2
    assert status["oldest_age_s"]["rollout"] >= 30


def test_an_element_that_is_no_message_counts_and_has_no_age(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    client.rpush(keys.celery_prefix + "reward", "{", '{"headers": []}', '{"headers": {"sent_at": "soon"}}')
    for left in (3, 2, 1):
        assert read_queues(client, run, ("reward",))["reward"].depth == left
        assert read_queues(client, run, ("reward",))["reward"].oldest_age_s == 0.0
        client.rpop(keys.celery_prefix + "reward")


@pytest.mark.parametrize(
    "hostile",
    [b"{", b"[]", b"[" * 50_000, b'{"role": 1}', b'{"role": "rollout", "idle_fraction": "x"}', b'{"up_s": 1}'],
)
def test_a_heartbeat_that_is_none_harms_nobody_who_reads_it(
    client: redis.Redis, keys: Keys, tmp_path: Path, hostile: bytes
) -> None:
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    RunRecord(client, keys).set_status("running")
    for role in ("rollout", "trainer"):
        send_heartbeat(client, keys, f"{role}@here:1", {"role": role})
        client.set(keys.process(f"{role}@here:1"), hostile)
    status = collect_status(client, run)
    assert {stats["role"] for stats in status["processes"].values()} == {"rollout", "trainer"}
    assert any("its heartbeat cannot be read" in alarm for alarm in status["alarms"])
    assert "idle_fraction/rollout" not in FlowMeter(client, run).metrics(step_s=1.0)
