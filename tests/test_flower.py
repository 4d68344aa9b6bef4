"""Celery's own tools on Sluice's workers: remote control, task events, Flower."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import redis
from builders import make_config, publish_policy, push_group
from harness import running, wait_for, worker

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.run import create_run
from sluice.scripts.launcher.redis_server import free_port

NUM_GROUPS = 3


def test_flower_and_events_show_what_a_worker_does(
    client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path
) -> None:
    config = make_config(trainer={"loss": {"kl_beta": 0.0}}, metrics={"remote_control": True})
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    env = {"SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": keys.run}
    port = free_port()
    flower = [sys.executable, "-m", "celery", "-A", "sluice", "flower", "--address=127.0.0.1", f"--port={port}"]
    with (
        worker("reward", cwd=tmp_path, **env),
        running(flower, cwd=tmp_path, log=tmp_path / "flower.log", FLOWER_UNAUTHENTICATED_API="true", **env),
    ):
        app = make_app(keys.run, url=redis_url)
        answers = wait_for(lambda: app.control.inspect(timeout=1).ping(), timeout=60, what="the worker's answer")
        (name,) = answers
        assert [queue["name"] for queue in app.control.inspect().active_queues()[name]] == ["reward"]
        app.control.enable_events()
        wait_for(lambda: name in ask(port, "workers?refresh=1"), timeout=60, what="the worker in Flower")
        ledger = Ledger(client, keys, config, worker="w")
        for _ in range(NUM_GROUPS):
            send_stage(app, push_group(ledger, until="rollout"), "reward")
        done = wait_for(
            lambda: len(found := ask(port, "tasks?state=SUCCESS")) == NUM_GROUPS and found,
            timeout=30,
            what="the tasks in Flower",
        )
        assert {(task["name"], task["worker"]) for task in done.values()} == {("reward.score", name)}
        assert client.xlen(keys.stream(0)) == NUM_GROUPS
        app.close()


def ask(port: int, what: str) -> dict[str, Any]:
    """Flower's API; nothing while it does not answer yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{what}", timeout=20) as answer:
            return dict(json.loads(answer.read()))
    except OSError:
        return {}
