"""Depth and oldest age of Celery's queues, from messages that Celery itself sent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from builders import make_config

from common.broker import make_app, send_part
from common.keys import Keys
from common.queues import queue_depths, read_queues
from common.run import create_run
from dashboard.status import collect_status


def test_the_oldest_message_of_a_queue_is_the_one_sent_first(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    run = create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    app, now = make_app(keys.run), time.time()
    for group, sent_s_ago in (("t0", 30.0), ("t1", 5.0)):
        monkeypatch.setattr("common.broker.time.time", lambda ago=sent_s_ago: now - ago)
        send_part(app, group, "rollout")
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
        assert queue_depths(client, run, ("reward",)) == {"reward": left}
        assert read_queues(client, run, ("reward",))["reward"].oldest_age_s == 0.0
        client.rpop(keys.celery_prefix + "reward")
