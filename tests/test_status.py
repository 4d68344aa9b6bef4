"""`sluice status`: one screen with what Redis holds, which follows the run and outlives an outage of Redis."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import redis
from builders import make_config
from harness import ROOT, environment, wait_for
from rich.console import Console

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.monitoring.autoscale import Scale
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.operations.control import change, pause
from sluice.common.run import RunRecord, create_run
from sluice.dashboard.run_state import collect_status
from sluice.dashboard.terminal import render, sparkline
from sluice.scripts.launcher.redis_server import EmbeddedServer


def screen(status: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(status))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_screen_says_what_redis_holds(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    run = create_run(client, keys.run, make_config(trainer={"num_steps": 100}), assets={}, folder=str(tmp_path))
    RunRecord(client, keys).set_status("running")
    began = time.time()
    for step in range(1, 11):
        line = {"step": step, "time": began + 2 * step, "reward/mean": step / 10, "off_policy/ess": 0.9}
        write_metrics(client, keys, line, max_length=100)
    serves = {"role": "rollout", "device": "cpu", "version": 9, "digest": "abc", "tokens_per_s": 1234.5}
    works = {"idle_fraction": 0.25, "running": 3, "done": 40, "up_s": 61.0}
    send_heartbeat(client, keys, "rollout@here:1", serves | works)
    client.hset(keys.run_record, "dashboard", "http://127.0.0.1:1/?run=x")
    scale = Scale(desired=4, have=1, min=1, max=4, reason="load", at=0.0, since=0.0)
    client.hset(keys.autoscale, "reward", scale.model_dump_json())
    client.hincrby(keys.counts("train"), "admitted", 1)
    shown = screen(collect_status(client, run))
    assert f"{keys.run}: running, step 10/100, 0:03:00 to go" in shown
    assert "http://127.0.0.1:1/?run=x" in shown
    assert "reward 1.000 ▁" in shown and "ESS 0.900" in shown
    assert "stalled: no trainer is running" in shown
    assert "BROKEN" in shown
    row = next(line for line in shown.splitlines() if "rollout@here:1" in line)
    assert " ".join(row.split()).startswith("rollout rollout@here:1 cpu 9 abc 1,234 75% 3 40 61.0 s 0.")
    assert re.search(r"reward +0 +0\.0 s +0 +4 *\n", shown)
    change(client, run, ["learning_rate=1e-6"], who="alice")
    pause(client, run, who="bob")
    shown = screen(collect_status(client, run))
    assert "set since: trainer.learning_rate=1e-06" in shown
    assert "paused by bob since" in shown


def test_values_that_do_not_differ_or_are_none_are_a_flat_curve() -> None:
    assert sparkline([0.5, 0.5, float("nan")]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=20)) == 20


def test_watch_goes_on_over_an_outage_of_redis_and_ends_with_the_run(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    client = connect(own_redis.url)
    keys = create_run(client, "watched", make_config(), assets={}, folder=str(tmp_path)).keys
    RunRecord(client, keys).set_status("running")
    master, slave = pty.openpty()
    argv = [sys.executable, "-m", "sluice.scripts.cli", "status", "--watch", "watched"]
    env = environment(PYTHONPATH=str(ROOT), SLUICE_REDIS_URL=own_redis.url, COLUMNS="200", LINES="60", TERM="xterm")
    process = subprocess.Popen(argv, cwd=tmp_path, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.set_blocking(master, False)
    seen = ""

    def sees(text: str) -> bool:
        nonlocal seen
        with contextlib.suppress(OSError):  # nothing new, or it has ended
            seen += os.read(master, 1 << 20).decode(errors="replace")
        return text in seen

    wait_for(lambda: sees("no trainer is running"), timeout=30, what="the screen")
    own_redis.process.kill()
    own_redis.process.wait()
    wait_for(lambda: sees("Redis cannot be reached; all of this is"), timeout=30, what="the message that it is old")
    own_redis.restart()
    RunRecord(client, keys).set_status("finished")
    assert process.wait(30) == 0
    assert sees("watched: finished")
    os.close(master)
    client.close()
