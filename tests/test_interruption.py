"""Ctrl-C, resumption, and no orphans, also when the supervisor itself is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from harness import (
    alive,
    children,
    metrics_of,
    only_run,
    quickstart_config,
    running_sluice,
    serving,
    sluice,
    tiny_folder,
    wait_for,
)


def some_steps(folder: Path, count: int) -> bool:
    runs = list((folder / "runs").glob("*/metrics.jsonl"))
    return bool(runs) and len(metrics_of(runs[0].parent)) >= count


def test_ctrl_c_ends_everything_soon_and_resume_goes_on(tmp_path: Path) -> None:
    steps = 14
    config = quickstart_config(tmp_path, tiny=tiny_folder(), trainer__num_steps=steps, evaluation__datasets=[])
    with running_sluice("run", str(config), "checkpoint.every_steps=4", cwd=tmp_path) as process:
        wait_for(lambda: some_steps(tmp_path, 5), timeout=100, what="five steps")
        family = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130  # 10 s on a quiet machine; other tests run beside this one
        assert alive(family) == []
    run = only_run(tmp_path)
    assert "--resume" in (tmp_path / "output.log").read_text()
    assert json.loads((run / "summary.json").read_text())["ledger_holds"]

    assert (run / "checkpoints" / "latest").is_file()
    done = sluice("run", str(config), "--resume", cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path) == run  # the same run, not a fresh one
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["ledger_holds"]
    assert summary["ledger"]["trained"] == steps * 8
    assert summary["ledger"]["in_flight"] == 0
    trained = [metrics["step"] for metrics in metrics_of(run)]
    assert trained == list(range(1, steps + 1))  # SIGTERM saved the last step: none was trained twice


def test_nothing_survives_a_killed_supervisor(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, tiny=tiny_folder(), trainer__num_steps=1000, evaluation__datasets=[])
    with running_sluice("run", str(config), cwd=tmp_path) as process:
        wait_for(lambda: some_steps(tmp_path, 1), timeout=100, what="a step")
        family = children(process.pid)
        assert len(family) >= 6  # redis, four workers, trainer
        process.kill()
        wait_for(lambda: not alive(family), timeout=20, what=f"the end of {alive(family)}")


def test_killed_workers_and_a_killed_redis_are_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    steps = 24
    config = quickstart_config(tmp_path, tiny=tiny_folder(), trainer__num_steps=steps, evaluation__datasets=[])
    with running_sluice("run", str(config), "lease.running_s=3", "lease.queued_s=3", cwd=tmp_path) as process:
        wait_for(lambda: some_steps(tmp_path, 2), timeout=100, what="two steps")
        for queue in ("reward", "rollout"):
            serving(process.pid, queue)[0].kill()
        done = len(metrics_of(only_run(tmp_path)))
        wait_for(lambda: some_steps(tmp_path, done + 3), timeout=100, what="steps with other workers")
        (server,) = [child for child in children(process.pid) if child.name() in ("redis-server", "valkey-server")]
        server.kill()
        assert process.wait(240) == 0
    run = only_run(tmp_path)
    said = (tmp_path / "output.log").read_text()
    assert "the embedded Redis ended unexpectedly (exit code -9): starting it again" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["restarts"] == {"reward-0": 1, "rollout-0": 1}
    assert summary["steps"] == steps
    assert summary["ledger_holds"]
    assert summary["ledger"]["trained"] == steps * 8
    assert summary["ledger"]["in_flight"] == 0
