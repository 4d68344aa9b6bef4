"""`sluice run` keeps its roles alive, and knows when that is in vain."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builders import for_each, make_config
from harness import (
    SMALL,
    alive,
    children,
    only_run,
    quickstart_config,
    running_sluice,
    serving,
    tiny_folder,
    wait_for,
    wait_for_steps,
)

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.scripts.launcher.processes import Process
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.scripts.launcher.roles import Role, assigned_gpus, check_gpus, planned_workers
from sluice.scripts.launcher.supervisor import Child, RunFailed, Supervisor

UNLICENSED = """
import os, sys

if "-Q" in sys.argv:
    print("the grader's licence has run out", flush=True)
    os._exit(9)

def grade(completions, **kwargs):
    return [1.0] * len(completions)
"""


def test_a_crash_loop_ends_the_run_with_the_reason_and_the_tail_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "unlicensed.py").write_text(UNLICENSED)
    grader = [{"function": f"{tmp_path / 'unlicensed.py'}:grade"}]
    config = quickstart_config(tmp_path, tiny=tiny_folder(), evaluation__datasets=[], reward__functions=grader)
    with running_sluice("run", str(config), cwd=tmp_path) as process:
        wait_for(lambda: len(children(process.pid)) >= 6, timeout=60, what="the roles")
        family = children(process.pid)
        assert process.wait(240) == 1
        assert alive(family) == []
    output = (tmp_path / "output.log").read_text()
    assert "reward-0 died 5 times within 60 s (last exit code 9)" in output
    assert "the grader's licence has run out" in output
    assert "Traceback" not in output


def supervising(folder: Path, program: str, **options: Any) -> tuple[Supervisor, Child, Process]:
    """A supervisor that has started a trainer alone, which is this Python program, and what is in `options`."""
    named: dict[str, Any] = {"run": "test", "url": "redis://", "folder": folder, "trainer_is_alive": lambda: True}
    supervisor = Supervisor(make_config(), status=lambda: "running", **{**named, **options})
    trainer = supervisor._trainer
    trainer.argv = [sys.executable, "-c", program]
    supervisor._children = [child for child in supervisor._children if not child.queue]
    supervisor.start()
    assert trainer.process is not None
    return supervisor, trainer, trainer.process


def test_a_trainer_of_one_rank_waits_for_no_others_and_divergence_ends_the_run_also_after_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # a machine whose environment names some
    monkeypatch.setenv("RANK", "3")
    program = "import os, sys; print('error: diverged,', os.environ['RANK'], os.environ['WORLD_SIZE']); sys.exit(3)"
    supervisor, trainer, process = supervising(tmp_path, program)
    trainer.num_restarts = 4
    process.wait(20)
    with pytest.raises(RunFailed, match=r"^diverged, 0 1$") as caught:
        supervisor.poll()
    assert caught.value.exit_code == 3


def test_a_killed_role_and_that_it_works_again_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    asked: list[tuple[str, int]] = []

    def is_working(role: str, pid: int, age_s: float) -> bool:
        asked.append((role, pid))
        assert 0 <= age_s < 60
        return len(asked) > 2  # it takes a while

    program = "import time; time.sleep(60)"
    supervisor, trainer, process = supervising(tmp_path, program, say=said.append, is_working=is_working)
    supervisor.poll()
    assert said == asked == [], "a role that never ended is no news"
    process.kill()
    process.wait(10)
    wait_for(lambda: supervisor.poll() and len(said) == 2, timeout=20, what="both messages")
    for _ in range(3):
        supervisor.poll()
    assert trainer.process is not None and set(asked) == {("trainer", trainer.process.pid)}
    supervisor.stop()
    assert said[0] == "trainer was killed by SIGKILL; it is started again in 0.5 s"
    assert re.fullmatch(r"trainer works again, \d+\.\d s after it ended", said[1]) and len(said) == 2


def test_logs_are_bounded_while_their_processes_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.scripts.launcher.supervisor.MAX_LOG_BYTES", 10_000)
    monkeypatch.setattr("sluice.scripts.launcher.supervisor.LOGS_EVERY_S", 0.0)
    program = "import time\nfor i in range(100_000): print(i, 'x' * 90, flush=True); time.sleep(0.0005)"
    supervisor, trainer, _ = supervising(tmp_path, program)
    sizes: list[int] = []

    def was_cut_twice() -> bool:
        assert supervisor.poll()
        sizes.append(trainer.log.stat().st_size)
        return sum(after < before for before, after in itertools.pairwise(sizes)) > 1

    wait_for(was_cut_twice, timeout=30, what="two cuts")
    supervisor.stop()
    before = trainer.log.with_name("trainer.log.1").read_text().splitlines()
    assert int(before[-1].split()[0]) > len(before) - 1, "the newest part before this one"
    assert max(sizes) < 1_000_000 and b"\0" not in trainer.log.read_bytes()


@pytest.mark.parametrize("code", [2, 0])
def test_what_a_run_can_do_without_is_given_up_with_a_word(tmp_path: Path, code: int) -> None:
    said: list[str] = []
    fails = Role(name="dashboard", argv=[sys.executable, "-c", f"import sys; sys.exit({code})"])
    program = "import time; time.sleep(60)"
    supervisor, trainer, process = supervising(tmp_path, program, extra=[fails], say=said.append)

    def is_given_up() -> bool:
        assert supervisor.poll()
        for child in supervisor._children:
            child.start_at = 0.0  # its pauses are not what is tested
        return len(said) == 5

    wait_for(is_given_up, timeout=20, what="the message")
    waits = [0.5, 1.0, 2.0, 4.0] if code else [0.0] * 4
    assert said[:4] == [f"dashboard ended with exit code {code}; it is started again in {wait_s} s" for wait_s in waits]
    assert (
        said[4] == f"dashboard died 5 times and is not started again (its log: {tmp_path / 'logs' / 'dashboard.log'})"
    )
    assert supervisor._children == [trainer]
    assert process.poll() is None
    supervisor.stop()


@pytest.mark.parametrize("heartbeats", [True, False])
def test_a_trainer_that_beats_has_time_for_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heartbeats: bool
) -> None:
    monkeypatch.setattr("sluice.scripts.launcher.supervisor.STOP_S", 0.2)
    program = f"""
import pathlib, signal, time
def write(*signal):
    while not pathlib.Path({str(tmp_path / "asked")!r}).exists():
        time.sleep(0.01)
    pathlib.Path({str(tmp_path / "checkpoint")!r}).touch()
    raise SystemExit
signal.signal(signal.SIGTERM, write)
print("ready", flush=True)
time.sleep(60)
"""

    def asked() -> bool:
        if heartbeats:  # its checkpoint takes until it is asked after, which is after STOP_S
            (tmp_path / "asked").touch()
        return heartbeats

    supervisor, trainer, process = supervising(tmp_path, program, trainer_is_alive=asked)
    wait_for(lambda: "ready" in trainer.log.read_text(), timeout=20, what="the trainer")
    supervisor.stop()
    assert (tmp_path / "checkpoint").exists() == heartbeats
    assert process.poll() is not None


def test_a_role_that_dies_while_redis_is_away_is_started_when_it_is_back(
    tmp_path: Path, own_redis: EmbeddedServer
) -> None:
    steps = 20
    config = quickstart_config(tmp_path, tiny=tiny_folder(), evaluation__datasets=[], trainer__num_steps=steps, **SMALL)
    leases = ("lease.running_s=3", "lease.queued_s=3")
    with running_sluice("run", str(config), *leases, cwd=tmp_path, SLUICE_REDIS_URL=own_redis.url) as process:
        wait_for_steps(tmp_path, 2)
        own_redis.process.kill()
        own_redis.process.wait()
        serving(process.pid, "rollout")[0].kill()
        away_since = time.monotonic()
        output, message = tmp_path / "output.log", "every role waits for it"
        wait_for(lambda: message in output.read_text(), timeout=20, what="the message that Redis is unreachable")
        wait_for(lambda: time.monotonic() - away_since > 3, timeout=20, what="two restarts' worth of time")
        assert serving(process.pid, "rollout") == []
        own_redis.restart()
        assert process.wait(240) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["restarts"]["rollout-0"] == 1
    assert (summary["ledger_holds"], summary["ledger"]["trained"]) == (True, steps * 4)


def gpu_config(
    engine: str = "vllm", *, rollout: int, evals: int = 0, size: int = 1, share: float = 0.9, ranks: int = 1
) -> Config:
    return make_config(
        rollout={"engine": engine, "tensor_parallel_size": size, "gpu_memory_utilization": share},
        replicas={"rollout": rollout, "eval": evals, "trainer": ranks},
        evaluation={"datasets": [{"dataset": {"path": "heldout.jsonl"}}]},
    )


def test_every_rollout_engine_gets_its_gpus_and_the_last_gpu_is_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    pairs = gpu_config(rollout=2, size=2)
    assert planned_workers(pairs)[-2:] == [("rollout,eval", 0), ("rollout,eval", 1)]
    assert [assigned_gpus(pairs, "rollout,eval", i) for i in (0, 1)] == [["0", "1"], ["2", "3"]]
    assert assigned_gpus(pairs, "reference", 0) == ["4"]
    check_gpus(pairs)
    two_ranks = gpu_config(rollout=3, ranks=2)
    assert [assigned_gpus(two_ranks, "rollout,eval", i) for i in range(3)] == [["0"], ["1"], ["2"]]
    assert assigned_gpus(two_ranks, "reference", 0) == ["4"]
    check_gpus(two_ranks)
    shared = gpu_config("torch", rollout=6, evals=1)
    assert [assigned_gpus(shared, "rollout", i) for i in range(6)] == [["0"], ["1"], ["2"], ["3"], ["0"], ["1"]]
    check_gpus(shared)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert assigned_gpus(pairs, "rollout,eval", 1) == []


@for_each(
    ("config", "message"),
    [
        (gpu_config(rollout=8), "would hold 2 vLLM engines at rollout.gpu_memory_utilization=0.9: .*.rollout=7 "),
        (gpu_config(rollout=7, evals=1), "would hold 1 vLLM engines .* beside the trainer: .* replicas.eval=0"),
        (gpu_config(rollout=1, size=8), "8 GPUs leave 7 for rollout workers"),
        (gpu_config(rollout=7, ranks=2), "GPU 0 would hold 2 vLLM engines .*: set replicas.rollout=6 "),
        (gpu_config("torch", rollout=1, ranks=9), "replicas.trainer=9: a rank needs a GPU of its own, and there are 8"),
    ],
)
def test_vllm_engines_that_do_not_fit_on_the_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, config: Config, message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    with pytest.raises(ConfigError, match=message):
        check_gpus(config)
    check_gpus(gpu_config(rollout=7))
