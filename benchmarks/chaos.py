"""A full run while a killer picks a random role every few seconds; nothing may be lost and nothing trained twice.

    python benchmarks/chaos.py [--minutes 5] [--seed 0] [--every 4] [--steps 300] [--out benchmarks/results/chaos.json]

It runs `sluice run config/quickstart.yaml` (real Redis, real workers, real gradients) and sends, at random moments to a random
role, SIGKILL, SIGTERM, or SIGSTOP and after 2-10 seconds SIGCONT; Redis (append-only file, started again by `sluice run`) only
SIGKILL. Where it is permitted, one more rollout worker lives in a network namespace of its own and has its network cut for
5 to 20 seconds (benchmarks/far_worker.py). When the minutes are over the killing ends and the run goes on to its last step.
The same job is run undisturbed beside it, for its accuracy. What is claimed is read from records that the killed processes do
not hold in memory:

* lost: groups of the ledger that are neither settled nor in flight (the identity), and steps without a full batch
* trained twice: group ids that occur more than once in the checkpoints' `trained_groups` of the surviving lineage
* recovery: seconds from a kill to the next step of the trainer
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
from far_worker import FarWorker, far_worker

from sluice.scripts.prepare_tiny import prepare

ROLES = ("dataset", "rollout", "reference", "reward", "trainer", "redis")
FAR = "far rollout"
MOST_PER_MINUTE = 3
"""Deaths of one role within a minute: `sluice run` takes five for a crash loop and ends the run."""
STOPPED_S = (2.0, 10.0)
CUT_S = (5.0, 20.0)
GROUPS_PER_STEP = 8


class Killer:
    """Sends signals to the children of a `sluice run`, and cuts the network of a worker outside it."""

    def __init__(self, pid: int, *, seed: int, far: FarWorker | None) -> None:
        self._root = psutil.Process(pid)
        self._draw = random.Random(seed)
        self._far = far
        self._far_busy_until = 0.0
        self.kills: list[dict[str, Any]] = []

    def strike(self) -> None:
        role = self._draw.choice((*ROLES, FAR) if self._far else ROLES)
        if role == FAR:
            self._cut()
            return
        number = (
            signal.SIGKILL
            if role == "redis"
            else self._draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
        )
        deaths = [
            k for k in self.kills if k["role"] == role and k["signal"] != "SIGSTOP" and time.time() - k["at"] < 60
        ]
        if number != signal.SIGSTOP and len(deaths) >= MOST_PER_MINUTE:
            return
        victim = self._find(role)
        if victim is None:
            return
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return
        if number == signal.SIGSTOP:
            timer = threading.Timer(self._draw.uniform(*STOPPED_S), _continue, [victim])
            timer.daemon = True
            timer.start()
        self.kills.append({"at": time.time(), "role": role, "signal": signal.Signals(number).name})

    def _cut(self) -> None:
        assert self._far is not None
        if time.time() < self._far_busy_until:
            return
        seconds = self._draw.uniform(*CUT_S)
        self._far_busy_until = time.time() + 2 * seconds
        self._far.cut(seconds)
        self.kills.append({"at": time.time(), "role": FAR, "signal": "network cut"})

    def _find(self, role: str) -> psutil.Process | None:
        """A role's process, the worker itself or (reward) one of its pool children."""
        found = []
        for process in self._root.children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            is_worker = "-Q" in words and words[words.index("-Q") + 1] == role
            is_redis = role == "redis" and any(name in words[0] for name in ("redis-server", "valkey") if words)
            if is_worker or is_redis or (role == "trainer" and words[1:3] == ["-m", "sluice.trainer"]):
                found.append(process)
        return self._draw.choice(found) if found else None


def _continue(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


def run_under_fire(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tiny = folder / "tiny"
    prepare(tiny, seed=0)
    undisturbed = None if arguments.only_chaos else run_in_peace(folder, tiny, steps=arguments.steps)
    run, output = folder / "runs" / "chaos", folder / "output"
    with output.open("wb") as log, _sluice_run("chaos", folder, tiny, steps=arguments.steps, log=log) as process:
        wait_for_first_step(run, process)
        url = (run / "redis" / "url").read_text()
        with contextlib.ExitStack() as stack:
            far, relay_port = None, 0
            if FarWorker.is_permitted():
                far, relay_port = stack.enter_context(far_worker(url=url, run="chaos", log=folder / "far.log"))
            killer = Killer(process.pid, seed=arguments.seed, far=far)
            end = time.monotonic() + 60 * arguments.minutes
            while time.monotonic() < end and process.poll() is None:
                if far:
                    far.keep_alive(relay_port)
                time.sleep(killer._draw.uniform(0.5, 1.5) * arguments.every)
                killer.strike()
                print(f"\r{len(killer.kills)} signals", end="", file=sys.stderr, flush=True)
            code = process.wait()
    if code:
        raise SystemExit(f"\nsluice run ended with {code}:\n{output.read_text()[-3000:]}")
    report = judge(run, killer.kills)
    far_text = f"started {far.num_starts} times" if far else "not permitted here (needs root and ip)"
    report["rollout_worker_in_its_own_network"] = far_text
    report["undisturbed"] = undisturbed
    return report


def run_in_peace(folder: Path, tiny: Path, *, steps: int) -> dict[str, Any]:
    """The same job with nobody killed."""
    output = folder / "peace"
    with output.open("wb") as log, _sluice_run("peace", folder, tiny, steps=steps, log=log) as process:
        if process.wait():
            raise SystemExit(f"the undisturbed run ended with {process.returncode}:\n{output.read_text()[-3000:]}")
    summary = json.loads((folder / "runs" / "peace" / "summary.json").read_text())
    return {name: summary[name] for name in ("eval_before", "eval_after", "wall_s", "restarts")}


def _sluice_run(name: str, folder: Path, tiny: Path, *, steps: int, log: Any) -> subprocess.Popen[bytes]:
    heldout = {
        "name": "heldout",
        "num_prompts": 200,
        "function": "MathReward",
        "dataset": {"path": str(tiny / "heldout.jsonl")},
    }
    overrides = {
        "model.path": str(tiny / "model"),
        "dataset.path": str(tiny / "train.jsonl"),
        "evaluation.datasets": [heldout],
        "evaluation.every_steps": 0,
        "trainer.num_steps": steps,
        "checkpoint.every_steps": 5,
        "checkpoint.keep": 100_000,  # all of them: they are the record
        "lease.running_s": 5.0,
        "lease.queued_s": 5.0,
        "lease.max_attempts": 20,  # a group may lose many workers here; a dead letter would not be a loss, but would hide one
        "output_dir": str(folder / "runs"),
    }
    argv = [
        sys.executable,
        "-c",
        "from sluice.scripts.cli import main; main()",
        "run",
        str(ROOT / "config/quickstart.yaml"),
    ]
    argv += [f"{key}={json.dumps(value)}" for key, value in overrides.items()] + ["--name", name]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("SLUICE_REDIS_URL", None)
    return subprocess.Popen(argv, stdout=log, stderr=log, env=env)


def wait_for_first_step(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not steps_of(run):
        if time.monotonic() > deadline or process.poll() is not None:
            raise SystemExit("the run made no step")
        time.sleep(0.2)


def steps_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if "reward/mean" in line]


def judge(run: Path, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of it."""
    summary = json.loads((run / "summary.json").read_text())
    states = [json.loads(path.read_text()) for path in sorted((run / "checkpoints").glob("step-*/state.json"))]
    trained = [group for state in states for group in state["trained_groups"]]
    twice = [group for group, count in collections.Counter(trained).items() if count > 1]
    steps = steps_of(run)
    moments = [line["time"] for line in steps]
    recoveries = [min((t - kill["at"] for t in moments if t > kill["at"]), default=0.0) for kill in kills]
    ledger = summary["ledger"]
    return {
        "benchmark": "chaos",
        "date": f"{datetime.date.today()}",
        "signals": len(kills),
        "signals_by_role": collections.Counter(f"{kill['role']} {kill['signal']}" for kill in kills),
        "restarts": summary["restarts"],
        "steps": summary["steps"],
        "steps_trained_again_after_a_rollback": len(steps) - len({line["step"] for line in steps}),
        "ledger": ledger,
        "lost": ledger["admitted"]
        - ledger["trained"]
        - sum(ledger["dropped"].values())
        - sum(ledger["dead"].values())
        - ledger["in_flight"],
        "groups_missing_from_checkpoints": summary["steps"] * GROUPS_PER_STEP - len(set(trained)),
        "trained_twice": len(twice),
        "longest_recovery_s": round(max(recoveries, default=0.0), 1),
        "median_recovery_s": round(sorted(recoveries)[len(recoveries) // 2], 1) if recoveries else 0.0,
        "eval_before": summary["eval_before"],
        "eval_after": summary["eval_after"],
        "wall_s": summary["wall_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long the killing goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between two signals")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the run")
    parser.add_argument("--only-chaos", action="store_true", help="no undisturbed run beside it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-", ignore_cleanup_errors=True) as folder:
        report = run_under_fire(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + json.dumps(report, indent=1))
    if (
        report["lost"]
        or report["trained_twice"]
        or report["groups_missing_from_checkpoints"]
        or not report["ledger"]["holds"]
    ):
        raise SystemExit("something was lost or trained twice")


if __name__ == "__main__":
    main()
