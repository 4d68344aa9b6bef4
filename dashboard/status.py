"""The state of a run, read from Redis: one dictionary, which `sluice status`, the web page and Prometheus all show."""

from __future__ import annotations

import json
import time
from typing import Any

import redis
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.config import QUEUES
from common.control import effective
from common.diagnosis import Cause, alarms, diagnose, paused
from common.ledger import read_account
from common.metrics import is_silent, last_metrics, read_heartbeats
from common.queues import read_queues
from common.run import Run

STALLED_AFTER_S = 5.0


def collect_status(client: redis.Redis, run: Run) -> dict[str, Any]:
    """Everything `sluice status` shows; plain data."""
    record = client.hgetall(run.keys("run"))
    policy = {k.decode(): v.decode() for k, v in client.hgetall(run.keys("policy")).items()}
    metrics = last_metrics(client, run.keys)
    beats = read_heartbeats(client, run.keys)
    status = record.get(b"status", b"?").decode()
    queues = read_queues(client, run, QUEUES)
    cause = _stall_cause(client, run, beats) if status == "running" else None
    alarmed = alarms(client, run) if status == "running" else []
    return {
        "run": run.name,
        "status": status,
        "step": int(metrics.get("step", 0)),
        "num_steps": effective(client, run).trainer.num_steps,
        "policy": {name: policy.get(name) for name in ("version", "step", "digest", "published_at")},
        "reward": metrics.get("reward/mean"),
        "policy_age": metrics.get("staleness/mean"),
        "trained_tokens_per_s": metrics.get("throughput/trained_tokens_per_s"),
        "age_of_last_step_s": round(time.time() - metrics["time"], 1) if "time" in metrics else None,
        "queues": {name: queue.depth for name, queue in queues.items()},
        "oldest_age_s": {name: queue.oldest_age_s for name, queue in queues.items()},
        "ledger": {kind: read_account(client, run.keys, kind).to_dict() for kind in ("train", "eval")},
        "processes": beats,
        "stalled_by": cause and cause.text,
        "stall_kind": cause and cause.kind,
        "alarms": [alarm.text for alarm in alarmed],
        "alarm_kinds": [alarm.kind for alarm in alarmed],
        "desired_replicas": _desired_replicas(client, run),
        "metrics": metrics,
    }


def _desired_replicas(client: redis.Redis, run: Run) -> dict[str, int]:
    """What the load asks for, per queue (common/autoscale.py)."""
    wishes = client.hgetall(run.keys("autoscale"))
    return {queue.decode(): int(json.loads(wish)["desired"]) for queue, wish in wishes.items()}


def _stall_cause(client: redis.Redis, run: Run, beats: dict[str, dict[str, Any]]) -> Cause | None:
    """Why no step is made; none where one is being made."""
    if held := paused(client, run):
        return held
    trainer = next((facts for facts in beats.values() if facts["role"] == "trainer"), None)
    if trainer is None:
        return Cause("no_trainer", "no trainer is running")
    if is_silent(trainer):
        text = f"the trainer has been silent for {trainer['silent_s']:.0f} s: dead, stopped or cut off"
        return Cause("silent_trainer", text)
    return diagnose(client, run) if trainer["waiting_s"] > STALLED_AFTER_S else None


def render(status: dict[str, Any]) -> RenderableType:
    """A screen for `sluice status`."""
    title = Text(f"{status['run']}: {status['status']}, step {status['step']}/{status['num_steps']}", style="bold")
    title.append(f", policy version {status['policy']['version']}", style="default")
    if status["stalled_by"]:
        title.append(f"\nstalled: {status['stalled_by']}", style="bold red")
    for alarm in status["alarms"]:
        title.append(f"\nalarm: {alarm}", style="red")
    return Group(title, _numbers(status), _flow(status), _processes(status))


def _numbers(status: dict[str, Any]) -> Text:
    shown = [
        ("reward", status["reward"], "{:.3f}"),
        ("policy age", status["policy_age"], "{:.2f}"),
        ("trained tokens/s", status["trained_tokens_per_s"], "{:,.0f}"),
        ("last step", status["age_of_last_step_s"], "{:.1f} s ago"),
    ]
    return Text("   ".join(f"{name} {form.format(value)}" for name, value, form in shown if value is not None))


def _flow(status: dict[str, Any]) -> Table:
    account = status["ledger"]["train"]
    table = Table(title="ledger", title_justify="left")
    columns = ["admitted", "trained", "in_flight", "dropped", "dead", "retried", "resent", "refused", "identity"]
    for name in columns:
        table.add_column(name, justify="right")
    values = [str(sum(account[n].values()) if isinstance(account[n], dict) else account[n]) for n in columns[:-1]]
    table.add_row(*values, "holds" if account["holds"] else "BROKEN")
    return table


def _processes(status: dict[str, Any]) -> Table:
    table = Table(title="queues and processes", title_justify="left")
    for name in ("role", "queued", "process", "running", "done", "version", "digest", "up", "note"):
        table.add_column(name)
    for queue in (*QUEUES, "trainer"):
        depth = str(status["queues"].get(queue, ""))
        mine = {name: facts for name, facts in status["processes"].items() if facts["role"] == queue}
        if not mine:
            table.add_row(queue, depth, "-")
        for name, facts in mine.items():
            cells = [str(facts.get(key, "")) for key in ("running", "done", "version", "digest", "up_s")]
            table.add_row(queue, depth, name, *cells, str(facts.get("alarm") or ""))
            depth = ""
    return table
