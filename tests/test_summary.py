"""The end of a run: what the trainer leaves in the run folder, whoever started it and however it ended, and what is printed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import make_config
from harness import SMALL, create_run, trainer, workers

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.run import Run, RunRecord, open_run
from sluice.common.run import create_run as store_run
from sluice.scripts.launcher.summary import end_text, next_text
from sluice.trainer.summary import Ended, write_summary
from sluice.workers.work_log import WorkLog

SCORES = {"pass@1": 0.5, "pass@1_stderr": 0.1, "mean_length": 9.0, "clipped_ratio": 0.0}


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Run:
    """A run of three trained steps, the second one twice."""
    run = store_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    for step, reward in ((1, 0.25), (2, 9.0), (2, 0.5), (3, 0.75)):
        metrics = {"step": step, "reward/mean": reward, "num_tokens": 10, "policy_age/1": 2}
        write_metrics(client, keys, metrics, max_length=100)
    return run


def summarized(client: redis.Redis, run: Run, **options: Any) -> tuple[Ended, dict[str, Any]]:
    ended = write_summary(client, run, **{"status": "finished", "wall_s": 2.0, **options})
    return ended, json.loads((Path(run.folder) / "summary.json").read_text())


def test_what_sluice_run_adds_draws_nothing_again_and_a_failure_does(client: redis.Redis, run: Run) -> None:
    _, first = summarized(client, run)
    assert (first["steps"], first["trained_tokens"], first["reward_last"]) == (3, 30, 0.75)
    assert (first["status"], first["ended"]) == ("finished", "all 3 steps are trained")
    picture = Path(run.folder) / "reward.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn_at = picture.stat().st_mtime_ns
    ended, second = summarized(client, run, wall_s=5.0, restarts={"rollout-0": 2})
    assert (second["wall_s"], second["restarts"]) == (5.0, {"rollout-0": 2})
    assert picture.stat().st_mtime_ns == drawn_at
    assert "restarted  rollout-0 2x" in end_text(ended, Path(run.folder))
    why = "training has diverged: $loss_1$ is not finite"
    _, third = summarized(client, run, status="failed", failure=why)
    assert (third["status"], third["ended"]) == ("failed", why)
    assert picture.stat().st_mtime_ns > drawn_at


def test_a_summary_that_cannot_be_written_costs_the_summary_only(
    client: redis.Redis, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(run.folder) / "summary.json").mkdir()
    ended = write_summary(client, run, status="stopped", wall_s=1.0)
    assert ended.summary["ended"] == "stopped at step 3"
    assert "was not written" in caplog.text


def test_the_end_has_a_line_per_evaluation_and_says_what_next(client: redis.Redis, run: Run) -> None:
    ended, _ = summarized(client, run)
    counts = {"num_prompts": 4, "num_dead": 0, "num_asked": 4, "logged": {}}
    for number in (3, 20):
        evaluations = [
            {"dataset": "a", "step": step, "version": step, **SCORES, "best": step == 2, **counts}
            for step in range(number)
        ]
        ended.summary["evaluations"] = evaluations
        lines = [line.strip() for line in end_text(ended, Path(run.folder)).splitlines() if "eval a" in line]
        steps = [0, 1, 2] if number == 3 else [0, 2, 19]
        assert [line.partition(":")[0] for line in lines[:3]] == [f"eval a at step {step}" for step in steps]
        assert lines[3:] == ([] if number == 3 else ["eval a: 17 more in summary.json"])
        assert lines[-1 if number == 3 else 1].endswith("best")
    shown = next_text(ended.summary, Path(run.folder))
    assert f"sluice samples {run.name}" in shown and "sluice dashboard" in shown
    assert "sluice chat" not in shown, "there is no checkpoint"
    checkpoint = Path(run.folder) / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    shown = next_text(ended.summary, Path(run.folder))
    assert "sluice chat " in shown and "sluice export " in shown


def test_roles_started_one_by_one_leave_a_summary_also_when_the_trainer_is_killed_at_its_end(
    tmp_path: Path, redis_url: str
) -> None:
    name = f"ends-{tmp_path.name}"
    env = create_run(tmp_path, redis_url, name=name, trainer__num_steps=3, **SMALL)
    folder = tmp_path / "runs" / name
    with connect(redis_url) as client:
        record = RunRecord(client, open_run(client, name).keys)
        with workers(tmp_path, env):
            with trainer(tmp_path, env, kill_at=("sluice.trainer.loop:write_summary", "before", 1)) as process:
                assert process.wait(180) == -9
            assert not (folder / "summary.json").exists() and record.status == "running"
            with trainer(tmp_path, env) as process:
                assert process.wait(120) == 0
        assert record.status == "finished"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["run"], summary["steps"], summary["ended"]) == (name, 3, "all 3 steps are trained")
    assert summary["ledger_holds"] and summary["wall_s"] > 0
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert f"its summary is {folder / 'summary.json'}" in (tmp_path / "trainer.log").read_text()


def test_a_worker_says_now_and_then_what_it_does_and_once_that_it_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sluice.worker")
    now = [100.0]
    monkeypatch.setattr("sluice.workers.work_log.time.monotonic", lambda: now[0])
    work_log = WorkLog("rollout")
    for done, running, tokens, busy_s in (
        (0, 1, 0, 0.0),
        (4, 2, 2000, 10.0),
        (5, 0, 3000, 15.0),
        *[(5, 0, 3000, 15.0)] * 3,
    ):
        work_log.update({"done": done, "running": running, "generated_tokens": tokens, "version": 7}, busy_s=busy_s)
        now[0] += 20.0
    assert caplog.messages == [
        "rollout: 4 groups in 20 s (4 in all), 2 in progress, 100 tokens/s, policy version 7, busy 50 %",
        "rollout: 1 groups in 20 s (5 in all), 0 in progress, 50 tokens/s, policy version 7, busy 25 %",
        "rollout: nothing to do for 20 s (5 in all)",
    ]
