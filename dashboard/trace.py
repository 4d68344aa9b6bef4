"""One group's whole life: when it reached each stage, who worked on it, how often it was tried."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import redis
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sluice.common.connections.broker import STAGE_TASKS
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.serialization import decode

STAGES = {
    "admitted": "admitted",
    "task": "prompt prepared",
    "rollout_started": "generation begun",
    "rollout": "generated",
    "reward_started": "scoring begun",
    "reward": "scored",
    "reference_started": "reference begun",
    "reference": "referenced",
    "ready": "complete, in the buffer",
    "leased": "taken for a batch",
}
"""Field `t:<stage>` of a group -> what happened."""


def read_trace(client: redis.Redis, keys: Keys, group: str) -> dict[str, Any]:
    """Of a group in flight, dead-lettered, or trained and kept as a sample. Raises ConfigError for another."""
    found = client.hgetall(keys("g", group))
    stats = {name.decode(): value for name, value in found.items()}
    if stats:
        times = {name[2:]: float(value) for name, value in stats.items() if name.startswith("t:")}
        work = {name: stats[name].decode() for name in stats if name.partition(":")[0] in ("by", "w", "n", "s")}
        stage = stats.get("stage", b"?").decode()
        trace = _trace(group, "dead" if stage == "dead" else "in flight", times, work)
        version = stats.get("version")
        trace |= {"stage": stage, "version": int(version) if version else None}
        for name in ("dead_reason", "dead_worker", "dead_detail", "last_error"):
            if name in stats:
                trace[name] = stats[name].decode(errors="replace")
        return trace
    for _, fields in client.xrevrange(keys("samples")):
        sample = decode(fields[b"sample"])
        if sample["group"] == group:
            trace = _trace(group, "trained", sample.get("timestamps", {}), sample.get("work", {}))
            return trace | {"stage": "trained", "version": sample["version"], "step": sample["step"]}
    raise ConfigError(
        f"group {group!r} is not in flight, no dead letter, and not among the trained groups that are kept (the first of each "
        "step): `sluice samples` and `sluice dead` list those"
    )


def _trace(group: str, where: str, times: dict[str, float], work: dict[str, str]) -> dict[str, Any]:
    ordered = sorted(((at, stage) for stage, at in times.items()), key=lambda found: found[0])
    began = ordered[0][0] if ordered else 0.0
    before = [at for at, _ in ordered[:1]] + [at for at, _ in ordered]
    stages = [
        {
            "stage": stage,
            "what": STAGES.get(stage, stage),
            "at": at,
            "since_start_s": at - began,
            "since_last_s": at - last,
        }
        for (at, stage), last in zip(ordered, before, strict=False)
    ]
    assignments = [
        {
            "stage": stage,
            "held_by": (work.get(f"by:{stage}") or work.get(f"w:{stage}", "")).rpartition("/")[0],
            "attempts": int(work.get(f"n:{stage}", 0)),
            "sent_again": int(work.get(f"s:{stage}", 0)),
        }
        for stage in STAGE_TASKS
        if f"n:{stage}" in work
    ]
    return {"group": group, "where": where, "stages": stages, "assignments": assignments}


def render_trace(trace: dict[str, Any]) -> RenderableType:
    """For a terminal."""
    head = f"group {trace['group']}: {trace['where']}"
    head += f", step {trace['step']}" if "step" in trace else f", stage {trace['stage']}"
    head += f", policy version {trace['version']}" if trace["version"] is not None else ""
    stages, assignments = Table(), Table()
    for name, side in (("stage", "left"), ("at", "left"), ("since start", "right"), ("since the one before", "right")):
        stages.add_column(name, justify=side)  # type: ignore[arg-type]
    for stage in trace["stages"]:
        clock = f"{datetime.fromtimestamp(stage['at']):%Y-%m-%d %H:%M:%S.%f}"[:-3]
        stages.add_row(stage["what"], clock, f"{stage['since_start_s']:.3f} s", f"{stage['since_last_s']:.3f} s")
    for name in ("stage", "held by", "attempts", "sent again"):
        assignments.add_column(name, overflow="fold")
    for stage in trace["assignments"]:
        assignments.add_row(stage["stage"], stage["held_by"], str(stage["attempts"]), str(stage["sent_again"]))
    reasons = [Text(f"{name}: {trace[name]}") for name in ("dead_reason", "dead_detail", "last_error") if name in trace]
    return Group(Text(head, style="bold"), stages, assignments, *reasons)
