"""A full run while a killer picks a random role every few seconds; nothing may be lost and nothing trained twice.

    python benchmarks/chaos.py [--minutes 13] [--every 1.2] [--steps 700] [--seed 5]

It runs `sluice run config/quickstart.yaml` (real Redis, real workers, real gradients) and sends, at random moments to a random
role, SIGKILL, SIGTERM, or SIGSTOP and after 2-10 seconds SIGCONT; Redis (append-only file, started again by `sluice run`) only
SIGKILL. Every few signals comes a fault that hits several at once:

* all workers; Redis and the trainer; the trainer before its first checkpoint (once, at the start)
* the base policy is removed, and the reference workers that hold it are killed
* every rollout worker, three times, each half a generation after the workers are back

Where it is permitted, one more rollout worker lives in a network namespace of its own and has its network cut for
5 to 20 seconds (benchmarks/shared/far_worker.py). When the minutes are over the killing ends and the run makes its last steps.
The same job is run undisturbed beside it, for its accuracy. What is claimed is read from records that the killed processes do
not hold in memory, and which process has which role is asked of the run (heartbeats):

* lost: groups of the ledger that are neither settled nor in flight (the identity), and steps without a full batch
* dead: dead letters; every group here is healthy, whatever its workers go through, at the default `lease.max_attempts`
* trained twice: group ids that occur more than once in the checkpoints' `trained_groups` of the surviving lineage
* recovery: seconds from a kill to the next step of the trainer
* timeline: seconds from the first step to each step and each signal (benchmarks/plots.py draws it)
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
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
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_fields
from sluice.common.monitoring.heartbeats import read_heartbeats

ROLES = ("dataset", "rollout", "reference", "reward", "trainer", "redis")
FAR = "far rollout"
MOST_PER_MINUTE = 3
"""Deaths of one role within a minute: `sluice run` takes five for a crash loop and ends the run."""
STOPPED_S = (2.0, 10.0)
CUT_S = (5.0, 20.0)
GROUPS_PER_STEP = 8
CORRELATED_EVERY = 4
"""Signals from one correlated fault to the next."""
WORKERS = ("dataset", "rollout", "reference", "reward")


class Killer:
    """Sends signals to the children of a `sluice run`, and cuts the network of a worker outside it."""

    def __init__(self, pid: int, *, run: Path, url: str, seed: int, far: FarWorker | None) -> None:
        self._root = psutil.Process(pid)
        self._run, self._run_folder, self._keys = run.name, run, Keys(run.name)
        self._client = redis.Redis.from_url(url, socket_timeout=1.0)
        self._draw = random.Random(seed)
        self._far = far
        self._far_busy_until = 0.0
        self._correlated = itertools.cycle(
            [self._kill_all_workers, self._kill_redis_and_trainer, self._remove_base, self._interrupt_generations]
        )
        self._num_strikes = 0
        self.kills: list[dict[str, Any]] = []

    def strike(self) -> None:
        self._num_strikes += 1
        if self._num_strikes % CORRELATED_EVERY == 0:
            next(self._correlated)()
            return
        role = self._draw.choice((*ROLES, FAR) if self._far else ROLES)
        if role == FAR:
            self._cut()
            return
        number = (
            signal.SIGKILL
            if role == "redis"
            else self._draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
        )
        if number != signal.SIGSTOP and not self._may_die(role):
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

    def kill_trainer_before_its_first_checkpoint(self) -> None:
        until(lambda: len(read_steps(self._run_folder)) >= 2, "two steps", period_s=0.01)
        assert not list((self._run_folder / "checkpoints").glob("step-*")), "a checkpoint is written already"
        self._kill("trainer", fault="trainer before its first checkpoint")

    def _kill_all_workers(self) -> None:
        self._kill(*WORKERS, fault="all workers")

    def _kill_redis_and_trainer(self) -> None:
        self._kill("redis", "trainer", fault="redis and trainer")

    def _remove_base(self) -> None:
        """Remove the base policy, and the process that holds it: the next one finds none until the trainer writes it again."""
        for path in (self._run_folder.parent / "policies").rglob("policy-00000000.safetensors"):
            path.unlink()
        self._kill("reference", fault="base policy removed")

    def _interrupt_generations(self) -> None:
        """Kill every rollout worker again and again, each time when it has been generating for half a generation."""
        for _ in range(3):
            if not self._kill("rollout", fault="every rollout worker"):
                return
            with contextlib.suppress(redis.RedisError, SystemExit):  # another fault may keep it from working
                until(self._is_generating, "a rollout worker that generates", timeout_s=20.0)
                time.sleep(self._half_generation_s())

    def _is_generating(self) -> bool:
        found = read_heartbeats(self._client, self._keys)
        return any(beat["role"] == "rollout" and beat.get("running") and beat["up_s"] < 20 for beat in found.values())

    def _half_generation_s(self) -> float:
        """Return half the mean seconds from claim to result, of groups in flight that are generated."""
        groups = [group.decode() for group in self._client.smembers(self._keys.live("train"))]
        times = read_fields(self._client, self._keys, groups, ["t:rollout_started", "t:rollout"])
        took = [float(ended) - float(began) for began, ended in times if began and ended]
        return fmean(took) / 2 if took else 0.2

    def _may_die(self, role: str) -> bool:
        recent = [kill for kill in self.kills if time.time() - kill["at"] < 60 and kill["signal"] != "SIGSTOP"]
        return sum(kill["role"] == role for kill in recent) < MOST_PER_MINUTE

    def _kill(self, *roles: str, fault: str) -> bool:
        """Kill all processes of these roles at once, unless one has died too often of late."""
        if not all(map(self._may_die, roles)):
            return False
        try:
            family = {process.pid: process for process in self._root.children(recursive=True)}
            victims = [(pid, role) for pid, role in roles_by_pid(self._client, self._run).items() if role in roles]
        except (redis.RedisError, psutil.NoSuchProcess):
            return False
        for pid, role in victims:
            if pid in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    family[pid].kill()
                self.kills.append({"at": time.time(), "role": role, "signal": "SIGKILL", "fault": fault})
        return True

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
        until(lambda: read_steps(run) or process.poll() is not None, "the first step", period_s=0.01)
        check_ended_well(process.poll() or 0, folder / "chaos.output")
        far, relay_port, url = None, 0, (run / "redis" / "url").read_text()
        if FarWorker.is_permitted():
            far, relay_port = stack.enter_context(far_worker(url=url, run="chaos", log=folder / "far.log"))
        killer = Killer(process.pid, run=run, url=url, seed=arguments.seed, far=far)
        killer.kill_trainer_before_its_first_checkpoint()
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
    began = moments[0] if moments else 0.0
    return {
        "timeline": {
            "steps": [[round(line["time"] - began, 1), line["step"]] for line in steps],
            "signals": [[round(kill["at"] - began, 1), kill["role"], kill["signal"]] for kill in kills],
        },
        "signals": len(kills),
        "signals_by_role": collections.Counter(f"{kill['role']} {kill['signal']}" for kill in kills),
        "correlated_faults": collections.Counter(kill["fault"] for kill in kills if "fault" in kill),
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
        "dead": sum(ledger["dead"].values()),
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
    settings = tiny_settings(arguments.folder, quick=arguments.quick) | {
        "evaluation.every_steps": 0,
        "trainer.num_steps": arguments.steps,
        "sampling.group_size": arguments.group_size,
        "checkpoint.every_steps": 8,
        "checkpoint.keep": 100_000,  # all of them: they are the record
        "lease.running_s": 5.0,
        "lease.queued_s": 5.0,
    }
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        settings["policy_store.path"] = str(folder / "policies")
        undisturbed = None if arguments.only_chaos else run_undisturbed(folder, settings)
        found = run_under_fire(arguments, folder, settings) | {"undisturbed": undisturbed}
    publish("chaos", arguments, {"runs": [found]})
    if (
        found["lost"]
        or found["dead"]
        or found["trained_twice"]
        or found["groups_missing_from_checkpoints"]
        or not found["ledger"]["holds"]
    ):
        raise SystemExit("something was lost, dead-lettered or trained twice")


if __name__ == "__main__":
    main()
