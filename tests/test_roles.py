"""Each role alone, as on many machines: plain Celery commands in another folder, workers that start, end and die."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest
from harness import assert_trained_once, create_run, metrics_of, running, terminate, trainer, wait_for, worker

from sluice.common.connections.client import connect
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.run import open_run
from sluice.scripts.launcher.redis_server import EmbeddedServer


@pytest.fixture
def redis_url(own_redis: EmbeddedServer) -> str:
    return own_redis.url


def heartbeats(url: str, role: str) -> dict[str, dict[str, object]]:
    client = connect(url)
    found = read_heartbeats(client, open_run(client, "roles").keys)
    client.close()
    return {name: stats for name, stats in found.items() if stats["role"] == role}


def test_workers_come_go_and_die_and_every_group_is_trained_once(tmp_path: Path, redis_url: str) -> None:
    steps = 30
    env = create_run(tmp_path, redis_url, trainer__num_steps=steps, checkpoint__every_steps=5, checkpoint__keep=100)
    with contextlib.ExitStack() as stack:
        for queue in ("dataset", "reward", "reference"):
            stack.enter_context(worker(queue, cwd=tmp_path, **env))
        first = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        daemon = stack.enter_context(trainer(tmp_path, env))
        folder = tmp_path / "runs" / "roles"
        wait_for(lambda: len(metrics_of(folder)) >= 3, timeout=90, what="three steps with one rollout worker")

        second = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        wait_for(
            lambda: (
                len(heartbeats(redis_url, "rollout")) == 2
                and all(f["done"] for f in heartbeats(redis_url, "rollout").values())
            ),
            timeout=60,
            what="a second rollout worker to share the load",
        )
        first.kill()  # SIGKILL: its groups are reassigned when their leases end
        at_kill = len(metrics_of(folder))
        wait_for(
            lambda: len(metrics_of(folder)) >= at_kill + 2,
            timeout=60,
            what="two steps after a rollout worker was killed",
        )

        daemon.kill()
        daemon.wait()
        again = stack.enter_context(trainer(tmp_path, env))
        third = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        wait_for(lambda: len(heartbeats(redis_url, "rollout")) >= 2, timeout=60, what="a third rollout worker")
        assert terminate(second, timeout=15) == 0  # hands back what it cannot finish
        assert again.wait(240) == 0
        assert third.poll() is None

    client = connect(redis_url)
    counters = read_counters(client, open_run(client, "roles").keys)
    client.close()
    assert counters.holds, counters
    assert counters.in_flight == 0
    assert counters.dead == {}
    assert counters.trained == steps * 8
    assert_trained_once(folder, steps)


def test_a_worker_with_wrong_options_says_what_to_pass(tmp_path: Path, redis_url: str) -> None:
    env = create_run(tmp_path, redis_url, trainer__num_steps=1)
    for options, expected in [
        ([], "-Q followed by one of dataset, rollout, reward, reference, eval"),
        (["-Q", "rollout,reward"], "-Q followed by one of"),
        (["-Q", "rolout"], "-Q followed by one of"),
        (["-Q", "reward", "-P", "solo"], "drop -P"),
    ]:
        argv = [sys.executable, "-m", "celery", "-A", "sluice", "worker", *options]
        with running(argv, cwd=tmp_path, log=tmp_path / "wrong.log", **env) as process:
            assert process.wait(90) == 2
        text = (tmp_path / "wrong.log").read_text()
        assert expected in text
        assert "Traceback" not in text
        (tmp_path / "wrong.log").unlink()


FLAKY_REWARD = """
import time

def flaky(prompts, completions, target, **kwargs):
    digit = int(target[0][-1])
    if len(completions) == 2:
        return [0.0, 0.0]  # the trial before the run
    if digit == 0:
        time.sleep(1000)
    if digit == 1:
        raise RuntimeError("the grader is broken")
    return [float(f"<answer>{t}</answer>" in c) for c, t in zip(completions, target)]
"""


def test_a_reward_that_hangs_or_raises_is_dead_lettered_and_never_a_score(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY_REWARD)
    env = create_run(
        tmp_path,
        redis_url,
        trainer__num_steps=4,
        trainer__loss={"kl_beta": 0.0},
        reward__functions=[{"function": str(tmp_path / "flaky.py") + ":flaky"}],
        reward__time_limit_s=0.3,
        reward__concurrency=2,
    )
    with contextlib.ExitStack() as stack:
        for queue in ("dataset", "reward", "rollout"):
            stack.enter_context(worker(queue, cwd=tmp_path, **env))
        daemon = stack.enter_context(trainer(tmp_path, env))
        assert daemon.wait(240) == 0
    client = connect(redis_url)
    keys = open_run(client, "roles").keys
    counters = read_counters(client, keys)
    dead = [client.hgetall(keys.group(group.decode())) for group in client.zrange(keys.dead, 0, -1)]
    client.close()
    assert counters.holds
    assert counters.trained == 4 * 8
    assert counters.dead == {"RewardError": len(dead)}
    assert dead, "of 32 and more sums some end in 0 or 1"
    assert counters.retried >= 2 * len(dead)  # three attempts each
    details = b" ".join(group[b"dead_detail"] for group in dead)
    assert b"the grader is broken" in details or b"SoftTimeLimitExceeded" in details
    assert all(
        b"rollout" in group and b"reward" not in group for group in dead
    )  # the payload is kept, no score was made up


def test_sigterm_makes_the_trainer_checkpoint_and_exit_0(tmp_path: Path, redis_url: str) -> None:
    env = create_run(
        tmp_path, redis_url, trainer__num_steps=1000, checkpoint__every_steps=1000, trainer__loss={"kl_beta": 0.0}
    )
    folder = tmp_path / "runs" / "roles"
    with contextlib.ExitStack() as stack:
        for queue in ("dataset", "reward", "rollout"):
            stack.enter_context(worker(queue, cwd=tmp_path, **env))
        daemon = stack.enter_context(trainer(tmp_path, env))
        wait_for(lambda: len(metrics_of(folder)) >= 2, timeout=90, what="two steps")
        assert terminate(daemon, number=signal.SIGTERM) == 0
        done = len(metrics_of(folder))
        state = json.loads((folder / "checkpoints" / f"step-{done:08d}" / "state.json").read_text())
        assert state["step"] == done
        assert (folder / "checkpoints" / "latest").read_text() == f"step-{done:08d}"
        client = connect(redis_url)
        counters = read_counters(client, open_run(client, "roles").keys)
        client.close()
        assert counters.holds
        assert counters.trained == done * 8
