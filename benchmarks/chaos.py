"""A full run while a killer picks a random role every few seconds; nothing may be lost and nothing trained twice.

    python benchmarks/chaos.py [--minutes 13] [--every 1.2] [--steps 700] [--seed 5]

It runs `sluice run config/quickstart.yaml` (real Redis, real workers, real gradients) and sends, at random moments to a random
role, SIGKILL, SIGTERM, or SIGSTOP and after 2-10 seconds SIGCONT; Redis (append-only file, started again by `sluice run`) only
SIGKILL. Where it is permitted, one more rollout worker lives in a network namespace of its own and has its network cut for
5 to 20 seconds (benchmarks/shared/far_worker.py). When the minutes are over the killing ends and the run makes its last steps.
The same job is run undisturbed beside it, for its accuracy. What is claimed is read from records that the killed processes do
not hold in memory, and which process has which role is asked of the run (heartbeats):

* lost: groups of the ledger that are neither settled nor in flight (the identity), and steps without a full batch
* trained twice: group ids that occur more than once in the checkpoints' `trained_groups` of the surviving lineage
* recovery: seconds from a kill to the next step of the trainer
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import psutil
import redis

from benchmarks.shared.far_worker import FarWorker, far_worker
from benchmarks.shared.processes import (
    ROOT,
    check_ended_well,
    read_steps,
    roles_by_pid,
    start_sluice_run,
    tiny_settings,
    until,
)
from benchmarks.shared.report import new_parser, parse, publish

ROLES = ("dataset", "rollout", "reference", "reward", "trainer", "redis")
FAR = "far rollout"
MOST_PER_MINUTE = 3
"""Deaths of one role within a minute: `sluice run` takes five for a crash loop and ends the run."""
STOPPED_S = (2.0, 10.0)
CUT_S = (5.0, 20.0)
GROUPS_PER_STEP = 8


class Killer:
    """Sends signals to the children of a `sluice run`, and cuts the network of a worker outside it."""

    def __init__(self, pid: int, *, run: Path, url: str, seed: int, far: FarWorker | None) -> None:
        self._root = psutil.Process(pid)
        self._run = run.name
        self._client = redis.Redis.from_url(url, socket_timeout=1.0)
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
        """Return a role's process, the worker or (reward) one of its pool children; none while the run cannot be asked."""
        try:
            family = {process.pid: process for process in self._root.children(recursive=True)}
            roles = roles_by_pid(self._client, self._run)
            found = [family[pid] for pid, named in roles.items() if named == role and pid in family]
            if role == "reward":
                found += [child for process in found for child in process.children()]
        except (redis.RedisError, psutil.NoSuchProcess):
            return None
        return self._draw.choice(found) if found else None


def _continue(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


def run_under_fire(arguments: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    run = folder / "chaos"
    process = start_sluice_run("chaos", settings, folder=folder)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.terminate)
        until(lambda: read_steps(run) or process.poll() is not None, "the first step", period_s=0.2)
        check_ended_well(process.poll() or 0, folder / "chaos.output")
        far, relay_port, url = None, 0, (run / "redis" / "url").read_text()
        if FarWorker.is_permitted():
            far, relay_port = stack.enter_context(far_worker(url=url, run="chaos", log=folder / "far.log"))
        killer = Killer(process.pid, run=run, url=url, seed=arguments.seed, far=far)
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end and process.poll() is None:
            if far:
                far.keep_alive(relay_port)
            time.sleep(killer._draw.uniform(0.5, 1.5) * arguments.every)
            killer.strike()
            print(f"\r{len(killer.kills)} signals", end="", file=sys.stderr, flush=True)
        check_ended_well(process.wait(), folder / "chaos.output")
    report = judge(run, killer.kills)
    far_text = f"started {far.num_starts} times" if far else "not permitted here (needs root and ip)"
    return {**report, "rollout_worker_in_its_own_network": far_text}


def run_undisturbed(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the same job with no process killed."""
    process = start_sluice_run("undisturbed", settings, folder=folder)
    check_ended_well(process.wait(), folder / "undisturbed.output")
    summary = json.loads((folder / "undisturbed" / "summary.json").read_text())
    return {name: summary[name] for name in ("eval_before", "eval_after", "wall_s", "restarts")}


def judge(run: Path, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what came of it."""
    summary = json.loads((run / "summary.json").read_text())
    states = [json.loads(path.read_text()) for path in sorted((run / "checkpoints").glob("step-*/state.json"))]
    trained = [group for state in states for group in state["trained_groups"]]
    twice = [group for group, count in collections.Counter(trained).items() if count > 1]
    steps = read_steps(run)
    moments = [line["time"] for line in steps]
    recoveries = [min((t - kill["at"] for t in moments if t > kill["at"]), default=0.0) for kill in kills]
    ledger = summary["ledger"]
    return {
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=13.0, help="how long processes are killed")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--every", type=float, default=1.2, help="mean seconds between two signals")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of the run")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--only-chaos", action="store_true", help="no undisturbed run beside it")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="where the tiny model is kept")
    quick = {"minutes": 0.25, "every": 2.5, "steps": 20, "group_size": 4, "only_chaos": True}
    arguments = parse(parser, argv, quick=quick)
    settings = (
        tiny_settings(arguments.folder, quick=arguments.quick)
        | {
            "evaluation.every_steps": 0,
            "trainer.num_steps": arguments.steps,
            "sampling.group_size": arguments.group_size,
            "checkpoint.every_steps": 5,
            "checkpoint.keep": 100_000,  # all of them: they are the record
            "lease.running_s": 5.0,
            "lease.queued_s": 5.0,
            "lease.max_attempts": 20,  # a group may lose many workers here; a dead letter would be no loss, but would hide one
        }
    )
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        undisturbed = None if arguments.only_chaos else run_undisturbed(folder, settings)
        found = run_under_fire(arguments, folder, settings) | {"undisturbed": undisturbed}
    publish("chaos", arguments, {"runs": [found]})
    if (
        found["lost"]
        or found["trained_twice"]
        or found["groups_missing_from_checkpoints"]
        or not found["ledger"]["holds"]
    ):
        raise SystemExit("something was lost or trained twice")


if __name__ == "__main__":
    main()
