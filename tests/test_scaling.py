"""`sluice run` with a range of workers: it grows under load, drains when the load has gone, and survives what interrupts that."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from builders import make_config
from harness import (
    SMALL,
    alive,
    children,
    create_run,
    metrics_of,
    only_run,
    quickstart_config,
    running_sluice,
    serving,
    terminate,
    tiny_folder,
    trainer,
    wait_for,
    worker,
)

from sluice.common.connections.client import connect
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.autoscale import read_scales
from sluice.common.run import open_run
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.scripts.launcher.roles import Role
from sluice.scripts.launcher.supervisor import Child, Supervisor

GRADER = """
import pathlib, time

def grade(completions, **kwargs):
    if pathlib.Path({flag!r}).exists():
        time.sleep(3)
    return [float(len(text) % 2) for text in completions]
"""


def test_workers_follow_the_load_at_no_attempt_and_may_be_killed(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    slow, output, grader = tmp_path / "slow", tmp_path / "output.log", tmp_path / "grader.py"
    grader.write_text(GRADER.format(flag=str(slow)))
    slow.touch()
    config = quickstart_config(
        tmp_path,
        tiny=tiny_folder(),
        evaluation__datasets=[],
        reward__functions=[{"function": f"{grader}:grade"}],
        trainer__num_steps=100_000,
        replicas={"reward": {"min": 1, "max": 3}},
        autoscale={"up_after_s": 1.0, "cooldown_s": 3.0, "wait_s": 0.2},
        lease={"running_s": 5.0, "queued_s": 30.0},
        **SMALL,
    )
    with (
        running_sluice("run", str(config), cwd=tmp_path, SLUICE_REDIS_URL=own_redis.url) as process,
        connect(own_redis.url) as client,
    ):

        def workers() -> list[psutil.Process]:
            """Reward workers that `sluice run` itself started, without their pool children."""
            return [worker for worker in serving(process.pid, "reward") if worker.ppid() == process.pid]

        def wait_for_workers(count: int, *, without: psutil.Process | None = None) -> None:
            what = f"{count} reward workers"
            wait_for(lambda: len(found := workers()) == count and without not in found, timeout=120, what=what)

        def wait_for_steps(count: int) -> None:
            before = len(metrics_of(folder))
            wait_for(lambda: len(metrics_of(folder)) >= before + count, timeout=60, what=f"{count} steps")

        wait_for_workers(3)
        folder = only_run(tmp_path)
        keys = open_run(client, folder.name).keys
        wait_for_steps(1)
        slow.unlink()
        wait_for_workers(1)
        assert "reward-0" not in output.read_text()
        assert read_counters(client, keys).retried == 0
        events = [fields for _, fields in client.xrange(keys.events) if fields[b"event"] == b"scaled"]
        changes = [(int(f[b"from"]), int(f[b"to"])) for f in events if f[b"queue"] == b"reward"]
        assert changes[0][0] == changes[-1][1] == 1
        assert max(to for _, to in changes) == 3
        assert f"reward workers {changes[-1][0]} -> 1: " in output.read_text()
        scales = read_scales(client, keys)
        assert (scales["reward"].desired, scales["reward"].max) == (1, 3)
        assert (scales["rollout"].desired, scales["rollout"].have, scales["eval"].desired) == (1, 1, 0)
        slow.touch()
        wait_for_workers(3)
        newest = max(workers(), key=lambda worker: worker.create_time())
        newest.kill()
        wait_for_workers(3, without=newest)
        wait_for_steps(2)
        family = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 130, output.read_text()
        assert alive(family) == []
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["ledger_holds"], summary["ledger"]["dead"]) == (True, {})
    assert sum(summary["restarts"].values()) == 1, "only the one that was killed"


def test_a_worker_that_drains_finishes_what_it_holds(tmp_path: Path, own_redis: EmbeddedServer) -> None:
    """With no time at SIGTERM, which would hand the groups back, and much at SIGUSR2."""
    env = create_run(
        tmp_path,
        own_redis.url,
        lease__shutdown_grace_s=0.0,
        sampling__min_tokens=40,
        autoscale={"drain_s": 60.0},
        trainer__loss={"kl_beta": 0.0},
    )
    client = connect(own_redis.url)
    keys = open_run(client, env["SLUICE_RUN"]).keys

    def claimed() -> set[str]:
        pending = [line.decode().partition("|")[0] for line in client.zrange(keys.deadlines, 0, -1)]
        return {group for group in pending if client.hexists(keys.group(group), "by:rollout")}

    with ExitStack() as stack:
        stack.enter_context(trainer(tmp_path, env))
        stack.enter_context(worker("dataset", cwd=tmp_path, **env))
        process = stack.enter_context(worker("rollout", cwd=tmp_path, **env))
        held = wait_for(claimed, timeout=90, what="groups in generation")
        assert terminate(process, number=signal.SIGUSR2, timeout=60) == 0
        assert all(client.hexists(keys.group(group), "rollout") for group in held)
        counters = read_counters(client, keys)
        assert (counters.retried, counters.refused) == (0, 0)
    client.close()


FINISHES = "import signal, sys; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))"
"""A worker that holds nothing."""
HOLDS = "import signal; signal.signal(signal.SIGUSR2, lambda *_: print('drains', flush=True))"
"""A worker that does not finish what it holds; it goes at SIGTERM."""
IGNORES = f"{HOLDS}; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def supervising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    """A supervisor of `count` reward workers of up to 3, which are programs of this test and ready, and of no other role."""
    started: list[Supervisor] = []

    def supervise(program: str, count: int, **autoscale: float) -> Supervisor:
        argv = [sys.executable, "-c", f"{program}; print('ready', flush=True)\nwhile True: signal.pause()"]
        monkeypatch.setattr(
            "sluice.scripts.launcher.supervisor.worker_role",
            lambda config, queue, replica: Role(name=f"{queue}-{replica}", argv=argv),
        )
        config = make_config(
            replicas={"dataset": 0, "rollout": 0, "reference": 0, "eval": 0, "reward": {"min": 1, "max": 3}},
            autoscale=autoscale,
            lease={"shutdown_grace_s": 0.2},
        )
        supervisor = Supervisor(
            config,
            run="test",
            url="redis://",
            folder=tmp_path,
            status=lambda: "running",
            trainer_is_alive=lambda: False,
        )
        supervisor._trainer.argv = [sys.executable, "-c", "import signal; signal.pause()"]
        supervisor.start()
        started.append(supervisor)
        supervisor.scale("reward", count)
        for child in workers_of(supervisor):
            wait_for(lambda log=child.log: log.exists() and "ready" in log.read_text(), timeout=30, what=child.name)
        return supervisor

    yield supervise
    for supervisor in started:
        supervisor.stop()


def workers_of(supervisor: Supervisor) -> list[Child]:
    return [child for child in supervisor._children if child.queue]


def wait_until_left(supervisor: Supervisor, count: int) -> None:
    """Poll the supervisor until so many workers are left."""

    def is_left() -> bool:
        supervisor.poll()
        return len(workers_of(supervisor)) == count

    wait_for(is_left, timeout=30, what=f"{count} workers to be left")


def test_the_newest_workers_go_and_their_exit_is_no_restart(supervising: Callable[..., Supervisor]) -> None:
    supervisor = supervising(FINISHES, 3)
    assert [child.name for child in workers_of(supervisor)] == ["reward-0", "reward-1", "reward-2"]
    supervisor.scale("reward", 1)
    assert supervisor.num_workers("reward") == 1
    wait_until_left(supervisor, 1)
    assert workers_of(supervisor)[0].name == "reward-0"
    assert supervisor.restarts == {}


def test_a_worker_that_drains_keeps_its_number_until_it_has_gone(supervising: Callable[..., Supervisor]) -> None:
    """With its number go its GPUs: they are not given away while it still holds their memory."""
    supervisor = supervising(HOLDS, 3, drain_s=600)
    supervisor.scale("reward", 2)
    supervisor.scale("reward", 3)
    assert supervisor.num_workers("reward") == 2
    going = workers_of(supervisor)[2]
    assert going.process is not None
    going.process.kill()  # dying of something else while it drains is fine
    wait_until_left(supervisor, 2)
    assert going not in workers_of(supervisor)
    supervisor.scale("reward", 3)
    assert [child.replica for child in workers_of(supervisor)] == [0, 1, 2]
    assert supervisor.restarts == {}


@pytest.mark.parametrize("program", [HOLDS, IGNORES])
def test_a_drain_ends_in_time(
    supervising: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """After drain_s by SIGTERM, after STOP_S more by SIGKILL."""
    monkeypatch.setattr("sluice.scripts.launcher.supervisor.STOP_S", 0.2)
    supervisor = supervising(program, 2, drain_s=0.5)
    going = workers_of(supervisor)[1]
    supervisor.scale("reward", 1)
    wait_until_left(supervisor, 1)
    assert "drains" in going.log.read_text()
    assert going.process is not None
    assert going.process.returncode == (-signal.SIGTERM if program == HOLDS else -signal.SIGKILL)


def test_stopping_does_not_wait_for_a_drain(supervising: Callable[..., Supervisor]) -> None:
    supervisor = supervising(HOLDS, 2, drain_s=600)
    supervisor.scale("reward", 1)
    supervisor.stop()
    assert {child.process.returncode for child in workers_of(supervisor) if child.process} == {-signal.SIGTERM}
