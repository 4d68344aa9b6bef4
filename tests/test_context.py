"""What a worker process does around its work: leases while it makes progress, and an end when it makes none."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import redis
from builders import admit_one, make_config, make_ledger, publish_policy, task_payload
from harness import environment, running

from common.config import Config
from common.keys import Keys
from common.run import create_run
from workers.context import HUNG_EXIT_CODE

CHILD = """
import sys, time
from common.broker import make_app
from workers.context import Context
context = Context.open(make_app("{run}"), "rollout")
hang_at = time.monotonic() + {works_s}
context.progress_age_s = lambda: max(0.0, time.monotonic() - hang_at)
claim = context.ledger.claim("t0", "rollout", fields=())
context._claims[claim.holder] = claim
context.start_heart()
time.sleep(60)
"""


@pytest.fixture
def config() -> Config:
    return make_config(lease={"running_s": 0.6, "queued_s": 0.2})


def lease_left_s(client: redis.Redis, keys: Keys) -> float:
    deadline = client.zscore(keys("deadlines"), "t0|rollout")
    return -1.0 if deadline is None else deadline / 1000 - time.time()


def test_a_process_whose_engine_hangs_ends_itself(
    client: redis.Redis, keys: Keys, config: Config, redis_url: str, tmp_path: Path
) -> None:
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    publish_policy(client, keys, 0)
    ledger = make_ledger(client, keys, lease={"running_s": 0.6, "queued_s": 0.2})
    group_id = admit_one(ledger)
    ledger.store(group_id, "task", task_payload(group_id))
    argv = [sys.executable, "-c", CHILD.format(run=keys.run, works_s=2.0)]
    env = environment(SLUICE_REDIS_URL=redis_url, SLUICE_RUN=keys.run)
    started = time.monotonic()
    with running(argv, cwd=tmp_path, log=tmp_path / "child.log", **env) as process:
        held_until = 0.0
        while process.poll() is None and time.monotonic() - started < 30:
            if lease_left_s(client, keys) > 0 and client.hexists(keys("g", "t0"), "by:rollout"):
                held_until = time.monotonic()
            time.sleep(0.02)
        assert process.wait(1) == HUNG_EXIT_CODE, (tmp_path / "child.log").read_text()
    assert held_until - started > 1.5, "the lease was renewed while there was progress"
    assert "no progress for" in (tmp_path / "child.log").read_text()
    assert ledger.reap() == [("t0", "rollout", "train")], "another worker gets the group"
