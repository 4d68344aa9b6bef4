"""Processes that a benchmark starts: a peer that answers line by line, and a complete `sluice run` of the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis
import yaml

from sluice.common.keys import Keys
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.scripts.prepare_tiny import WARMUP_STEPS, prepare

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config" / "quickstart.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
QUICK_WARMUP_STEPS = 20


def environment(**extra: str) -> dict[str, str]:
    """Return our environment for a child: one thread, this checkout, nothing that names a Redis or a run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return {**kept, **ONE_THREAD, "PYTHONPATH": str(ROOT), **extra}


def missing(package: str, python: str) -> str | None:
    """Say what is missing where that Python cannot import the package; its side is then left out."""
    done = subprocess.run([python, "-c", f"import {package}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{package} ({(done.stderr.splitlines() or ['?'])[-1]})"


class PeerProcess:
    """A child that answers each line of JSON with one; it lives as long as the stack."""

    def __init__(self, module: str, *arguments: str, python: str, stack: ExitStack) -> None:
        self._name = " ".join((module, *arguments))
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        stack.callback(self._process.wait, 60)
        stack.callback(self._process.stdin.close)
        self.hello = self._reply()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply. Raises RuntimeError when the process has ended."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with exit code {self._process.wait(60)}")
        return json.loads(line)


def tiny_settings(folder: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Make the quickstart's model and data, unless they are there; the overrides of its config that name them."""
    tiny = folder.resolve() / f"tiny-{seed}{'-quick' * quick}"
    prepare(tiny, seed=seed, warmup_steps=QUICK_WARMUP_STEPS if quick else WARMUP_STEPS)
    datasets = yaml.safe_load(CONFIG.read_text())["evaluation"]["datasets"]
    datasets[0]["dataset"]["path"] = str(tiny / "heldout.jsonl")
    if quick:
        datasets[0]["num_prompts"] = 8
    paths = {"model.path": str(tiny / "model"), "dataset.path": str(tiny / "train.jsonl")}
    return {"seed": seed, **paths, "evaluation.datasets": datasets}


def typed(settings: dict[str, Any]) -> list[str]:
    """Return overrides as they are typed."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def start_sluice_run(name: str, settings: dict[str, Any], *, folder: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start `sluice run` of the quickstart: its run folder is folder/NAME, its output folder/NAME.output."""
    argv = [sys.executable, "-m", "sluice.scripts.cli", "run", str(CONFIG), "--name", name]
    with (folder / f"{name}.output").open("wb") as output:
        return subprocess.Popen(
            [*argv, *typed({**settings, "output_dir": str(folder)})],
            cwd=folder,
            env=environment(**env),
            stdout=output,
            stderr=output,
        )


def check_ended_well(code: int, output: Path) -> None:
    """End the benchmark with the tail of its output where a run has failed."""
    if code:
        raise SystemExit(f"sluice run ended with {code}:\n{output.read_text()[-3000:]}")


def read_lines(run: Path) -> list[dict[str, float]]:
    """Return all metrics that are written, those of evaluations too."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_steps(run: Path) -> list[dict[str, float]]:
    """Return the metrics of every trainer step that is written."""
    return [line for line in read_lines(run) if "reward/mean" in line]


def roles_by_pid(client: redis.Redis, run: str) -> dict[int, str]:
    """Return the role of each process that the run knows: by its heartbeat, and the server's own. Raises RedisError."""
    names = read_heartbeats(client, Keys(run))
    found = {int(name.rpartition(":")[2]): name.partition("@")[0] for name in names}
    return {**found, int(client.info("server")["process_id"]): "redis"}


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = 120.0, period_s: float = 0.02) -> None:
    """Wait for the condition, looking often: times are taken with it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(period_s)
