"""Where the CPU seconds of a `sluice run` go: its process tree watched from outside, its functions by benchmarks/probe.

    watcher = Watcher(pid, run=folder, probe_folder=folder)    # a thread that takes a Reading several times a second
    account(watcher.readings, since, until)                    # seconds by kind of work between two moments

Every CPU second of the tree is in exactly one line: what the probe measured by its kind; of the rest, the main threads of
Celery workers (and the reward worker's parent) as `celery_consume`, other threads and prefork children as `celery_task`,
what remains of the trainer as `trainer_rest`, the server as `redis`, `sluice run` itself as `supervisor`. Who is who is asked of
the run (heartbeats name the processes of the roles), so it does not matter how they were started.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks.probe.sitecustomize import read as read_probe
from benchmarks.shared.processes import roles_by_pid

PERIOD_S = 0.25
MODEL_WORK = ("generation", "evaluation", "reference", "training")
USER_WORK = ("reward_functions", "prompts")
"""What the user's own code and data cost: not ours, but not the model either; reported inside everything else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Cumulative CPU seconds of one process."""

    role: str
    is_prefork_child: bool
    cpu_s: float
    main_thread_s: float
    probed: dict[str, tuple[float, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The whole tree at one moment; processes that have ended keep their last values."""

    at: float
    processes: dict[int, Process]
    commands: dict[str, tuple[int, float]]
    "Redis command -> (calls, seconds inside it)"


class Watcher:
    """Reads the tree under `sluice run` until stopped."""

    def __init__(self, pid: int, *, run: Path, probe_folder: Path) -> None:
        self.snapshots: list[Snapshot] = []
        self._root = psutil.Process(pid)
        self._run = run
        self._probe_folder = probe_folder
        self._client: redis.Redis | None = None
        self._roles: dict[int, str] = {pid: "supervisor"}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            last = self.snapshots[-1] if self.snapshots else None
            commands = self._ask_redis() or (last.commands if last else {})
            processes = {**(last.processes if last else {}), **self._processes()}
            self.snapshots.append(Snapshot(at=time.time(), processes=processes, commands=commands))

    def _processes(self) -> dict[int, Process]:
        found = {}
        probed = read_probe(self._probe_folder)
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return found
        for process in tree:
            try:
                role, is_child = self._role(process)
                times = process.cpu_times()
                main = next((t for t in process.threads() if t.id == process.pid), None)
                found[process.pid] = Process(
                    role=role,
                    is_prefork_child=is_child,
                    cpu_s=times.user + times.system,
                    main_thread_s=main.user_time + main.system_time if main else 0.0,
                    probed=probed.get(process.pid, {}),
                )
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _role(self, process: psutil.Process) -> tuple[str, bool]:
        """(dataset | rollout | reference | reward | eval | trainer | redis | supervisor | other, prefork child?)

        A process is `other` until it has sent a heartbeat; its seconds until then are counted with its role afterwards.
        """
        if role := self._roles.get(process.pid):
            return role, False
        parent = self._roles.get(process.ppid(), "supervisor")
        return ("other", False) if parent == "supervisor" else (parent, True)

    def _ask_redis(self) -> dict[str, tuple[int, float]]:
        """Learn which process has which role; calls and seconds of each Redis command, none while the server is unavailable."""
        try:
            if self._client is None:
                address = self._run / "redis" / "url"
                self._client = redis.Redis.from_url(address.read_text(), socket_timeout=1.0)
            self._roles |= roles_by_pid(self._client, self._run.name)
            stats: dict[str, Any] = self._client.info("commandstats")
        except (redis.RedisError, OSError):
            return {}
        return {
            name.removeprefix("cmdstat_"): (int(value["calls"]), value["usec"] / 1e6) for name, value in stats.items()
        }


def counters(snapshots: Sequence[Snapshot], since: float | None, until: float) -> dict[str, Any]:
    """CPU seconds between two moments (none = the beginning): in all, by kind, by role, and what Redis says of itself."""
    last = _first_after(snapshots, until)
    first = Snapshot(at=snapshots[0].at, processes={}, commands={}) if since is None else _first_after(snapshots, since)
    kinds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    roles: dict[str, float] = defaultdict(float)
    by_role: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for pid, after in last.processes.items():
        before, known = first.processes.get(pid), snapshots[-1].processes[pid]
        after = replace(after, role=known.role, is_prefork_child=known.is_prefork_child)
        lines, counts = _lines(before, after)
        for kind, seconds in lines.items():
            kinds[kind] += seconds
            by_role[after.role][kind] += seconds
        for kind, count in counts.items():
            calls[kind] += count
        roles[after.role] += after.cpu_s - (before.cpu_s if before else 0.0)
    return {
        "wall_s": last.at - first.at,
        "cpu_s": sum(roles.values()),
        "cpu_s_by_role": _sorted(roles),
        "by_kind": _sorted(kinds),
        "by_role": {role: _sorted(by_role[role]) for role in sorted(by_role)},
        "calls": dict(calls),
        "redis_commands": _command_deltas(first, last),
    }


def _first_after(snapshots: Sequence[Snapshot], moment: float) -> Snapshot:
    """Not the nearest: the seconds of a call are known when it ends, so one that ends just then must be in."""
    return next((snapshot for snapshot in snapshots if snapshot.at >= moment), snapshots[-1])


def _lines(before: Process | None, after: Process) -> tuple[dict[str, float], dict[str, int]]:
    """One process' seconds by kind, adding up to its CPU time, and the probe's calls."""
    cpu_s = after.cpu_s - (before.cpu_s if before else 0.0)
    main_s = after.main_thread_s - (before.main_thread_s if before else 0.0)
    lines, counts = {}, {}
    for kind, (seconds, count) in after.probed.items():
        earlier = before.probed.get(kind, (0.0, 0)) if before else (0.0, 0)
        name = "evaluation" if kind == "generation" and after.role == "eval" else kind
        if seconds > earlier[0]:
            lines[name], counts[name] = seconds - earlier[0], count - earlier[1]
    rest = max(0.0, cpu_s - sum(lines.values()))
    if after.role in ("redis", "supervisor", "other"):
        lines[after.role] = rest
    elif after.role == "trainer":
        lines["trainer_rest"] = rest
    elif after.is_prefork_child:
        lines["celery_task"] = rest
    else:
        lines["celery_consume"] = min(rest, main_s)
        lines["celery_task"] = rest - lines["celery_consume"]
    return lines, counts


def _command_deltas(first: Snapshot, last: Snapshot) -> dict[str, dict[str, float]]:
    """Redis command -> calls and seconds, those that took longest first."""
    deltas = {}
    for name, (calls, seconds) in last.commands.items():
        before = first.commands.get(name, (0, 0.0))
        if calls > before[0]:
            deltas[name] = {"calls": calls - before[0], "s": round(seconds - before[1], 4)}
    return dict(sorted(deltas.items(), key=lambda item: -item[1]["s"]))


def _sorted(values: dict[str, float]) -> dict[str, float]:
    return {name: round(s, 3) for name, s in sorted(values.items(), key=lambda item: -item[1]) if s >= 0.0005}
