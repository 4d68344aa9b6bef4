"""What a worker process does around its work: leases while it makes progress, and an end when it makes none."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import redis
from builders import make_config, push_group, started_ledger
from harness import environment, running, wait_for

from sluice.common.config import Config
from sluice.common.connections.broker import make_app
from sluice.common.keys import Keys
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.run import create_run
from sluice.workers.context import HUNG_EXIT_CODE, Context
from sluice.workers.execution_lock import ExecutionLock

CHILD = """
import sys, time
from sluice.common.connections.broker import make_app
from sluice.workers.context import Context
context = Context.open(make_app("{run}"), "rollout")
hang_at = time.time() + {works_s}
context.progress_age_s = lambda: max(0.0, time.time() - hang_at)
print(hang_at, flush=True)
claim = context.ledger.claim("t0", "rollout", fields=())
context._claims[claim.holder] = claim
context.start_heartbeat()
time.sleep(60)
"""

LEASE_S = 0.8


@pytest.fixture
def config() -> Config:
    return make_config(lease={"running_s": LEASE_S, "queued_s": 0.2})


def test_a_process_whose_engine_hangs_ends_itself(
    client: redis.Redis, keys: Keys, config: Config, redis_url: str, tmp_path: Path
) -> None:
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    ledger = started_ledger(client, keys, lease=config.lease.model_dump())
    push_group(ledger, until="task")
    argv = [sys.executable, "-c", CHILD.format(run=keys.run, works_s=1.0)]
    env = environment(SLUICE_REDIS_URL=redis_url, SLUICE_RUN=keys.run)
    log = tmp_path / "child.log"
    with running(argv, cwd=tmp_path, log=log, **env) as process:
        ends = [0.0]

        def ended() -> bool:
            if client.hexists(keys.group("t0"), "by:rollout"):
                ends.append(float(client.zscore(keys.deadlines, "t0|rollout") or 0) / 1000)
            return process.poll() is not None

        wait_for(ended, timeout=30, what="a process without progress to end itself")
        assert process.wait(1) == HUNG_EXIT_CODE, log.read_text()
    hang_at = float(log.read_text().split()[0])
    assert max(ends) > hang_at, "the lease was renewed while there was progress"
    assert max(ends) < hang_at + 1.5 * LEASE_S, "the lease ends one lease after the last progress"
    assert "no progress for" in log.read_text()
    assert ledger.reap() == [("t0", "rollout", "train")], "another worker gets the group"


def test_the_heart_survives_whatever_redis_answers(
    client: redis.Redis, keys: Keys, config: Config, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    monkeypatch.setenv("SLUICE_RUN", keys.run)
    create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    client.set(keys.processes, "not a sorted set")  # the beat is answered with WRONGTYPE
    context = Context.open(make_app(keys.run, url=redis_url), "rollout")
    context.start_heartbeat()
    wait_for(lambda: refused_commands(client) > 2, timeout=10, what="beats to be refused")
    client.delete(keys.processes)
    wait_for(lambda: read_heartbeats(client, keys), timeout=10, what="the next beat")
    context.close()


def refused_commands(client: redis.Redis) -> int:
    return int(client.info("errorstats").get("errorstat_WRONGTYPE", {}).get("count", 0))


def test_a_part_that_wants_to_be_alone_waits_for_those_inside_and_goes_before_newcomers() -> None:
    lock, order, leave = ExecutionLock(), [], threading.Event()

    def be(name: str, *, exclusive: bool) -> threading.Thread:
        def enter() -> None:
            with lock.held(exclusive=exclusive):
                order.append(name)
                assert leave.wait(10)

        thread = threading.Thread(target=enter)
        thread.start()
        return thread

    threads = [be("first", exclusive=False), be("second", exclusive=False)]
    wait_for(lambda: len(order) == 2, timeout=5, what="two to be inside together")
    threads += [be("alone 1", exclusive=True), be("alone 2", exclusive=True)]
    wait_for(lambda: lock._want_exclusive == 2, timeout=5, what="two to wait to be alone")
    threads.append(be("newcomer", exclusive=False))
    assert sorted(order) == ["first", "second"]
    leave.set()
    for thread in threads:
        thread.join(10)
    assert sorted(order[2:4]) == ["alone 1", "alone 2"]
    assert order[4] == "newcomer"


def test_whoever_does_not_get_in_is_told_so_and_blocks_nobody_afterwards() -> None:
    lock = ExecutionLock(wait_s=0.05)
    with lock.held(exclusive=False) as acquired, lock.held(exclusive=True) as is_alone:
        assert acquired
        assert not is_alone
        with lock.held(exclusive=False) as is_beside:
            assert not is_beside, "it still wants to be alone"
    with lock.held(exclusive=True) as is_alone:
        assert is_alone
