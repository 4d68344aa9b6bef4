"""Each role alone, as on many machines: plain Celery commands in another folder, workers that start, end and die."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
from harness import (
    assert_trained_once,
    counters_of,
    create_run,
    metrics_of,
    running,
    terminate,
    trainer,
    wait_for,
    wait_for_steps,
    worker,
    workers,
)

from sluice.common.connections.client import connect
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.run import open_run
from sluice.dashboard.samples import read_samples
from sluice.scripts.launcher.redis_server import EmbeddedServer

BROKEN_FOR_SOME = """
def grade(prompts, completions, target, log_metric, log_extra, trainer_state, **kwargs):
    log_metric("characters", sum(map(len, completions)) / len(completions))
    log_extra("left", [trainer_state.max_steps - trainer_state.global_step] * len(completions))
    if target[0].endswith("1") and len(completions) > 2:  # not in the trial before the run
        raise RuntimeError("the grader is broken")
    return [float(f"<answer>{t}</answer>" in c) for c, t in zip(completions, target)]
"""


@pytest.fixture
def redis_url(own_redis: EmbeddedServer) -> str:
    return own_redis.url


def groups_done(url: str) -> list[int]:
    """By each rollout worker that sends heartbeats."""
    with contextlib.closing(connect(url)) as client:
        heartbeats = read_heartbeats(client, open_run(client, "roles").keys)
    return [stats["done"] for stats in heartbeats.values() if stats["role"] == "rollout"]


def test_workers_come_go_and_die_and_every_group_is_trained_once(tmp_path: Path, redis_url: str) -> None:
    steps, folder = 30, tmp_path / "runs" / "roles"
    (tmp_path / "broken.py").write_text(BROKEN_FOR_SOME)
    settings = {"trainer__num_steps": steps, "checkpoint__every_steps": 5, "checkpoint__keep": 100}
    grader = [{"function": f"{tmp_path / 'broken.py'}:grade"}]
    env = create_run(tmp_path, redis_url, reward__functions=grader, **settings)
    with contextlib.ExitStack() as stack:
        *_, first = stack.enter_context(workers(tmp_path, env, "dataset", "reward", "reference", "rollout"))
        daemon = stack.enter_context(trainer(tmp_path, env))
        wait_for_steps(tmp_path, 3)

        second = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        wait_for(
            lambda: [bool(done) for done in groups_done(redis_url)] == [True, True],
            timeout=60,
            what="a second rollout worker to share the load",
        )
        first.kill()  # SIGKILL: its groups are reassigned when their leases end
        wait_for_steps(tmp_path, len(metrics_of(folder)) + 2)

        daemon.kill()
        daemon.wait()
        again = stack.enter_context(trainer(tmp_path, env))
        third = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        wait_for(lambda: len(groups_done(redis_url)) >= 2, timeout=60, what="a third rollout worker")
        assert terminate(second, timeout=15) == 0  # hands back what it cannot finish
        wait_for_steps(tmp_path, len(metrics_of(folder)) + 1)
        assert terminate(again) == 0  # finishes its step, and writes a checkpoint of it
        latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
        assert json.loads((latest / "state.json").read_text())["step"] == metrics_of(folder)[-1]["step"]
        last = stack.enter_context(trainer(tmp_path, env))
        assert last.wait(240) == 0
        assert third.poll() is None

    counters = counters_of(env)
    assert counters.holds, counters
    assert (counters.in_flight, counters.trained) == (0, steps * 8)
    assert {*counters.dead} == {"RewardError"}, "of 240 and more sums some end in 1; no death of a worker costs a group"
    assert_trained_once(folder, steps)
    assert all(line["characters"] > 0 for line in metrics_of(folder) if "reward/mean" in line), "what rewards log"
    with contextlib.closing(connect(redis_url)) as client:
        (sample,) = read_samples(client, open_run(client, "roles").keys, count=1)
    assert {c["extra"]["left"] for c in sample["completions"]} == {steps - sample["version"]}


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
