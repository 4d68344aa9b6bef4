"""The state of a run, read from Redis: one dictionary, which `sluice status`, the web page and Prometheus all show."""

from __future__ import annotations

import json
import time
from typing import Any

import redis

from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.autoscale import read_scales
from sluice.common.monitoring.diagnosis import alarms, stall_cause
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.monitoring.metric_stream import last_metrics, newest_metrics
from sluice.common.monitoring.queues import read_queues
from sluice.common.operations.control import read_settings
from sluice.common.pipeline import QUEUES
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run, RunRecord

CURVE_STEPS = 200
"Newest steps from which the terminal's curve and the remaining time are computed."


def collect_status(client: redis.Redis, run: Run) -> dict[str, Any]:
    """Return everything that `sluice status` shows, as plain data."""
    record, policy = RunRecord(client, run.keys), read_pointer(client, run.keys)
    metrics = last_metrics(client, run.keys)
    settings = {key: json.loads(value) for key, value in read_settings(client, run.keys).items()}
    num_steps = settings.get("trainer.num_steps", run.config.trainer.num_steps)
    steps = [s for s in newest_metrics(client, run.keys, count=CURVE_STEPS) if "reward/mean" in s]
    heartbeats = read_heartbeats(client, run.keys)
    status, (paused, draining) = record.status or "?", record.held()
    queues, scales = read_queues(client, run, QUEUES), read_scales(client, run.keys)
    cause = stall_cause(client, run, heartbeats) if status == "running" else None
    alarmed = alarms(client, run) if status == "running" else []
    return {
        "run": run.name,
        "status": status,
        "step": int(metrics.get("step", 0)),
        "num_steps": num_steps,
        "eta_s": _eta_s(steps, num_steps) if status == "running" else None,
        "dashboard": record.dashboard or None,
        "settings": settings,
        "paused": paused,
        "draining": draining,
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
        "desired_replicas": {queue: scale.desired for queue, scale in scales.items()},
        "desired_because": {queue: scale.reason for queue, scale in scales.items()},
        "metrics": metrics,
    }


def _eta_s(steps: list[dict[str, float]], num_steps: int) -> float | None:
    """Return the seconds to the last step at the rate of the newest ones; none before there is a rate."""
    done = steps[-1]["step"] - steps[0]["step"] if steps else 0
    passed = steps[-1]["time"] - steps[0]["time"] if steps else 0.0
    return round(passed / done * (num_steps - steps[-1]["step"]), 1) if done > 0 and passed > 0 else None
