"""Real runs for tests: the quickstart's model and task, the real `sluice` command, real processes, real signals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import click
import psutil
import yaml

from sluice.common.connections.client import connect
from sluice.common.ledger.ledger import Counters, read_counters
from sluice.common.run import open_run
from sluice.scripts.launcher.fork_server import ForkServer
from sluice.scripts.launcher.forked import Command
from sluice.scripts.launcher.processes import Process
from sluice.scripts.launcher.redis_server import EmbeddedServer
from sluice.scripts.prepare_tiny import prepare

SMALL = {
    "sampling__group_size": 4,
    "replay_buffer__batch_size": 4,
    "trainer__loss": {"kl_beta": 0.0},
    "checkpoint__keep": 100,
}
"""Overrides of `create_run`: small steps, and every checkpoint kept as a record."""
ROOT = Path(__file__).resolve().parent.parent
KILL_AT = str(ROOT / "tests" / "kill_at.py")
LEASE = {"running_s": 3.0, "queued_s": 3.0, "shutdown_grace_s": 0.5}


@cache
def tiny_folder(warmup_steps: int = 60) -> Path:
    """The quickstart's data and model, made once for all test processes: it writes answers in form, of the usual length.

    After 3 CPU seconds of warm-up few are right; after the 700 steps of the quickstart (35 CPU seconds) every fourth.
    """
    folder = Path(os.environ["SLUICE_TEST_SHARED"]) / f"tiny-{warmup_steps}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            prepare(folder.with_suffix(".tmp"), warmup_steps=warmup_steps)
            folder.with_suffix(".tmp").rename(folder)
    return folder


def quickstart_config(folder: Path, *, tiny: Path, **overrides: Any) -> Path:
    """config/quickstart.yaml with the paths of `tiny`, and `section__key=value` overrides, as a file in `folder`."""
    config = yaml.safe_load((ROOT / "config" / "quickstart.yaml").read_text())
    config["model"]["path"] = str(tiny / "model")
    config["dataset"]["path"] = str(tiny / "train.jsonl")
    for dataset in config["evaluation"]["datasets"]:
        dataset["dataset"]["path"] = str(tiny / "heldout.jsonl")
    config["policy_store"] = {"path": str(folder / "policies")}
    config["dashboard"] = {"enabled": False}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            config.setdefault(section, {})[name] = value
        else:
            config[section] = value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**extra: str) -> dict[str, str]:
    """Our environment without anything that names a Redis, a run or a test (NiceGUI acts otherwise under pytest)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLUICE_", "PYTEST_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


@cache
def fork_server() -> ForkServer:
    """One for this test process: what it starts need not import torch and transformers once more. It dies with us."""
    return ForkServer()


def sluice(*arguments: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        argv = [sys.executable, "-m", "sluice.scripts.cli", *arguments]
        where = environment(**{**env, "PYTHONPATH": str(ROOT)})
        process = fork_server().fork(Command(argv=argv, cwd=str(cwd), stdout=str(out), stderr=str(err), env=where))
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())


@contextlib.contextmanager
def running(argv: list[str], *, cwd: Path, log: Path, **env: str) -> Iterator[Process]:
    """A process that is killed with all it started when the block ends.

    A Python program is forked from `fork_server`, but for a reward worker: it must not have loaded torch.
    """
    env = environment(**{**env, "PYTHONPATH": str(ROOT)})
    log.touch()  # a forked process opens it itself, in its own time
    if argv[0] == sys.executable and argv[1] in ("-m", "-c", KILL_AT) and "reward" not in argv:
        command = Command(argv=argv, cwd=str(cwd), stdout=str(log), stderr=str(log), env=env)
        process: Process = fork_server().fork(command)
    else:
        with log.open("ab") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            process = subprocess.Popen(argv, cwd=cwd, env=env, start_new_session=True, **streams)
    try:
        yield process
    finally:
        family = children(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(10)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def running_sluice(*arguments: str, cwd: Path, **env: str) -> AbstractContextManager[Process]:
    """`sluice ...` in the background; its output is in cwd/output.log."""
    argv = [sys.executable, "-m", "sluice.scripts.cli", *arguments]
    return running(argv, cwd=cwd, log=cwd / "output.log", **env)


def worker(queue: str, *, cwd: Path, **env: str) -> AbstractContextManager[Process]:
    """A worker started with the plain Celery command, in a folder that is not the project's."""
    argv = [sys.executable, "-m", "celery", "-A", "sluice", "worker", "-Q", queue, "--loglevel", "INFO"]
    return running(argv, cwd=cwd, log=cwd / f"{queue}.log", **env)


def trainer(
    folder: Path, env: dict[str, str], *, kill_at: tuple[str, str, int] | None = None
) -> AbstractContextManager[Any]:
    """The trainer daemon of a run; with `kill_at` it dies by SIGKILL at that place (tests/kill_at.py)."""
    argv = [sys.executable, "-m", "sluice.trainer"]
    if kill_at:
        argv = [sys.executable, KILL_AT, *map(str, kill_at), "sluice.trainer"]
    return running(argv, cwd=folder, log=folder / "trainer.log", **env)


def create_run(folder: Path, url: str, *, name: str = "roles", **overrides: Any) -> dict[str, str]:
    """A run in Redis for roles that are started one by one, with short leases; the environment that they need."""
    settings = {"evaluation__datasets": [], **{f"lease__{key}": value for key, value in LEASE.items()}, **overrides}
    config = quickstart_config(folder, tiny=tiny_folder(), **settings)
    done = sluice("create", str(config), "--name", name, cwd=folder, SLUICE_REDIS_URL=url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"export SLUICE_RUN={name}\n"
    return {"SLUICE_REDIS_URL": url, "SLUICE_RUN": name}


@contextlib.contextmanager
def workers(folder: Path, env: dict[str, str], *queues: str) -> Iterator[list[Process]]:
    """One worker per queue; by default what a run without a reference needs."""
    with contextlib.ExitStack() as stack:
        names = queues or ("dataset", "rollout", "reward")
        yield [stack.enter_context(worker(queue, cwd=folder, **env)) for queue in names]


def counters_of(env: dict[str, str]) -> Counters:
    """Return the training counters of a run."""
    with contextlib.closing(connect(env["SLUICE_REDIS_URL"])) as client:
        return read_counters(client, open_run(client, env["SLUICE_RUN"]).keys)


def assert_trained_once(run_folder: Path, steps: int, *, groups_per_step: int = 8) -> None:
    """Check the checkpoints of the surviving lineage (all kept): every step has its full batch, no group is in two."""
    latest = {int(metrics["step"]): metrics for metrics in metrics_of(run_folder)}
    assert sorted(latest) == list(range(1, steps + 1))
    states = [json.loads(path.read_text()) for path in (run_folder / "checkpoints").glob("step-*/state.json")]
    groups = [group for state in states for group in state["trained_groups"]]
    assert len(groups) == len(set(groups)) == steps * groups_per_step
    versions = [latest[step]["version"] for step in sorted(latest)]
    assert versions == sorted(set(versions))


def children(pid: int) -> list[psutil.Process]:
    """Every process that a process started, and theirs."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def serving(pid: int, queue: str) -> list[psutil.Process]:
    """Children of a process that are workers of a queue; the worker itself before its pool children."""
    found = []
    for child in children(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or not yet reaped
            if f" -Q {queue} " in " ".join(child.cmdline()):
                found.append(child)
    return found


def alive(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that still live."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


BUSY = 3
"""Factor on every timeout: other tests and other jobs run beside this one."""


def wait_for(condition: Callable[[], Any], *, timeout: float, what: str) -> Any:
    """Poll until the condition is true; fail with what was waited for. The time-out is that of a quiet machine."""
    deadline = time.monotonic() + BUSY * timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout:.0f} s for {what}")


def terminate(process: Process, *, number: int = signal.SIGTERM, timeout: float = 30) -> int:
    """Send a signal and wait for the exit code."""
    process.send_signal(number)
    return process.wait(timeout)


def wait_for_stall(folder: Path, env: dict[str, str], cause: str, *processes: Process) -> None:
    """`sluice status` and the trainer's log name what the run waits for, and no process has ended."""

    def is_named() -> bool:
        text = sluice("status", cwd=folder, **env).stdout
        return "stalled: " in text and cause in text

    wait_for(is_named, timeout=60, what=f"`sluice status` to name the stall: {cause}")
    log = folder / "trainer.log"
    wait_for(lambda: "trainer has waited" in log.read_text(), timeout=30, what="the trainer to say that it waits")
    assert [process.poll() for process in processes] == [None] * len(processes)


def kill(server: EmbeddedServer) -> None:
    """End a Redis as a power failure would."""
    server.process.kill()
    server.process.wait(10)


def metrics_of(run_folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl that describe a trainer step."""
    return [line for line in metrics_lines(run_folder) if "reward/mean" in line]


def metrics_lines(run_folder: Path) -> list[dict[str, Any]]:
    """Return all complete lines of metrics.jsonl: the last one may be half written."""
    path = run_folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for_steps(folder: Path, number: int) -> None:
    """Wait until the one run in this folder has trained so many steps."""
    wait_for(
        lambda: sum(len(metrics_of(run)) for run in folder.glob("runs/*")) >= number, timeout=90, what=f"{number} steps"
    )


def only_run(folder: Path) -> Path:
    """The one run folder under runs/."""
    (found,) = [path.parent for path in (folder / "runs").glob("*/config.yaml")]
    return found


def every_command(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command and all below it, each by the words that follow `sluice`."""
    yield path, group
    for name, child in group.commands.items() if isinstance(group, click.Group) else ():
        yield from every_command(child, (*path, name))
