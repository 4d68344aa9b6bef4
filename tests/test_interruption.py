"""Ctrl-C, resumption, and no orphans, also when the supervisor itself is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from harness import (
    alive,
    assert_trained_once,
    children,
    metrics_of,
    only_run,
    quickstart_config,
    running_sluice,
    serving,
    sluice,
    tiny_folder,
    wait_for,
    wait_for_steps,
)


def config_of(folder: Path, steps: int) -> str:
    return str(quickstart_config(folder, tiny=tiny_folder(), trainer__num_steps=steps, evaluation__datasets=[]))


def finished(run_folder: Path, steps: int) -> dict[str, Any]:
    """The summary of a run that lost nothing."""
    summary: dict[str, Any] = json.loads((run_folder / "summary.json").read_text())
    ledger = summary["ledger"]
    assert (summary["steps"], summary["ledger_holds"]) == (steps, True)
    assert (ledger["trained"], ledger["in_flight"]) == (steps * 8, 0)
    return summary


def test_ctrl_c_ends_everything_soon_and_resume_goes_on(tmp_path: Path) -> None:
    steps = 14
    config = config_of(tmp_path, steps)
    with running_sluice("run", config, "checkpoint.every_steps=4", cwd=tmp_path) as process:
        wait_for_steps(tmp_path, 5)
        family = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130  # 10 s on a quiet machine; other tests run beside this one
        assert alive(family) == []
    run = only_run(tmp_path)
    assert "--resume" in (tmp_path / "output.log").read_text()
    assert json.loads((run / "summary.json").read_text())["ledger_holds"]

    assert (run / "checkpoints" / "latest").is_file()
    done = sluice("run", config, "--resume", cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path) == run  # the same run, not a fresh one
    finished(run, steps)
    trained = [metrics["step"] for metrics in metrics_of(run)]
    assert trained == list(range(1, steps + 1))  # SIGTERM saved the last step: none was trained twice


def test_nothing_survives_a_killed_supervisor(tmp_path: Path) -> None:
    with running_sluice("run", config_of(tmp_path, 1000), cwd=tmp_path) as process:
        wait_for_steps(tmp_path, 1)
        family = children(process.pid)
        assert len(family) >= 6  # redis, four workers, trainer
        process.kill()
        wait_for(lambda: not alive(family), timeout=20, what=f"the end of {alive(family)}")


def test_killed_workers_redis_and_fork_server_are_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    steps, done = 24, lambda: len(metrics_of(only_run(tmp_path)))
    settings = ("lease.running_s=3", "lease.queued_s=3", "checkpoint.every_steps=2", "checkpoint.keep=100")
    with running_sluice("run", config_of(tmp_path, steps), *settings, cwd=tmp_path) as process:
        wait_for_steps(tmp_path, 2)
        for queue in ("reward", "rollout"):
            serving(process.pid, queue)[0].kill()
        wait_for_steps(tmp_path, done() + 3)
        (server,) = [child for child in children(process.pid) if child.name() in ("redis-server", "valkey-server")]
        server.kill()
        server.wait(10)
        wait_for_steps(tmp_path, done() + 3)
        (server,) = [c for c in children(process.pid) if "sluice.scripts.launcher.fork_server" in " ".join(c.cmdline())]
        assert server.num_threads() == 1
        family = server.children()
        server.kill()
        wait_for(lambda: not alive(family), timeout=20, what="its roles to end with it")
        assert process.wait(240) == 0
    said = (tmp_path / "output.log").read_text()
    assert "the embedded Redis ended unexpectedly (exit code -9): starting it again" in said
    assert "the embedded Redis works again, after " in said
    for role in ("rollout-0", "reward-0", "trainer"):
        assert f"{role} was killed by SIGKILL; it is started again in 0.5 s" in said
        assert f"{role} works again, " in said
    restarts = finished(only_run(tmp_path), steps)["restarts"]
    assert restarts == {"reward-0": 1, "rollout-0": 2, "dataset-0": 1, "reference-0": 1, "trainer": 1}
    assert_trained_once(only_run(tmp_path), steps)
