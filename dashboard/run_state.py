"""The state of a run, read from Redis: one dictionary, which `sluice status`, the web page and Prometheus all show."""

from __future__ import annotations

import json
import time
from typing import Any

import redis

from sluice.common.config import QUEUES
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.diagnosis import Cause, alarms, diagnose, paused
from sluice.common.monitoring.metrics import is_silent, last_metrics, newest_metrics, read_heartbeats
from sluice.common.monitoring.queues import read_queues
from sluice.common.run import Run

STALLED_AFTER_S = 5.0
CURVE_STEPS = 200
"Newest steps that the terminal's curve and the time that remains are made of."


def collect_status(client: redis.Redis, run: Run) -> dict[str, Any]:
    """Everything `sluice status` shows; plain data."""
    record = client.hgetall(run.keys("run"))
    policy = {k.decode(): v.decode() for k, v in client.hgetall(run.keys("policy")).items()}
    metrics = last_metrics(client, run.keys)
    settings = {key.decode(): json.loads(value) for key, value in client.hgetall(run.keys("settings")).items()}
    num_steps = settings.get("trainer.num_steps", run.config.trainer.num_steps)
    steps = [s for s in newest_metrics(client, run.keys, count=CURVE_STEPS) if "reward/mean" in s]
    heartbeats = read_heartbeats(client, run.keys)
    status = record.get(b"status", b"?").decode()
    queues = read_queues(client, run, QUEUES)
    cause = _stall_cause(client, run, heartbeats) if status == "running" else None
    alarmed = alarms(client, run) if status == "running" else []
    return {
        "run": run.name,
        "status": status,
        "step": int(metrics.get("step", 0)),
        "num_steps": num_steps,
        "eta_s": _eta_s(steps, num_steps) if status == "running" else None,
        "dashboard": record.get(b"dashboard", b"").decode() or None,
        "settings": settings,
        "paused": json.loads(record[b"paused"]) if b"paused" in record else None,
        "draining": json.loads(record[b"draining"]) if b"draining" in record else None,
        "policy": {name: policy.get(name) for name in ("version", "step", "digest", "published_at")},
        "reward": metrics.get("reward/mean"),
        "rewards": [round(s["reward/mean"], 4) for s in steps],
        "policy_age": metrics.get("staleness/mean"),
        "generated_tokens_per_s": metrics.get("throughput/generated_tokens_per_s"),
        "trained_tokens_per_s": metrics.get("throughput/trained_tokens_per_s"),
        "age_of_last_step_s": round(time.time() - metrics["time"], 1) if "time" in metrics else None,
        "queues": {name: queue.depth for name, queue in queues.items()},
        "oldest_age_s": {name: queue.oldest_age_s for name, queue in queues.items()},
        "ledger": {kind: read_counters(client, run.keys, kind).to_dict() for kind in ("train", "eval")},
        "processes": heartbeats,
        "stalled_by": cause and cause.text,
        "stall_kind": cause and cause.kind,
        "alarms": [alarm.text for alarm in alarmed],
        "alarm_kinds": [alarm.kind for alarm in alarmed],
        "desired_replicas": _desired_replicas(client, run),
        "metrics": metrics,
    }


def _eta_s(steps: list[dict[str, float]], num_steps: int) -> float | None:
    """Seconds to the last step at the pace of the newest ones; none before there is a pace."""
    done = steps[-1]["step"] - steps[0]["step"] if steps else 0
    passed = steps[-1]["time"] - steps[0]["time"] if steps else 0.0
    return round(passed / done * (num_steps - steps[-1]["step"]), 1) if done > 0 and passed > 0 else None


def _desired_replicas(client: redis.Redis, run: Run) -> dict[str, int]:
    """What the load asks for, per queue (common/operations/autoscale.py)."""
    wishes = client.hgetall(run.keys("autoscale"))
    return {queue.decode(): int(json.loads(wish)["desired"]) for queue, wish in wishes.items()}


def _stall_cause(client: redis.Redis, run: Run, heartbeats: dict[str, dict[str, Any]]) -> Cause | None:
    """Why no step is made; none where one is being made."""
    if held := paused(client, run):
        return held
    trainer = next((stats for stats in heartbeats.values() if stats["role"] == "trainer"), None)
    if trainer is None:
        return Cause("no_trainer", "no trainer is running")
    if is_silent(trainer):
        text = f"the trainer has been silent for {trainer['silent_s']:.0f} s: dead, stopped or cut off"
        return Cause("silent_trainer", text)
    return diagnose(client, run) if trainer.get("waiting_s", 0.0) > STALLED_AFTER_S else None
