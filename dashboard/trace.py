"""The history of one group: when it reached each stage, who worked on it, how often it was tried."""

from __future__ import annotations

from typing import Any

import redis
from rich.console import Group, RenderableType

from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_group
from sluice.common.monitoring.metric_stream import newest_samples
from sluice.common.pipeline import STAGES
from sluice.dashboard.rows import assignment_rows, stage_rows
from sluice.dashboard.terminal import plain_text, table

LABELS = {
    **{f"{stage.name}_started": stage.labels[0] for stage in STAGES},
    **{stage.name: stage.labels[1] for stage in STAGES},
    "ready": "complete, in the buffer",
    "leased": "sampled for a batch",
}
"""Field `t:<stamp>` of a group -> what happened."""


def read_trace(client: redis.Redis, keys: Keys, group: str) -> dict[str, Any]:
    """Return the trace of a group in flight, dead-lettered, or trained and kept as a sample. Raises ConfigError for another."""
    if stats := read_group(client, keys, group):
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
    kept = []
    for sample in newest_samples(client, keys):
        if sample["group"] == group:
            trace = _trace(group, "trained", sample.get("timestamps", {}), sample.get("work", {}))
            return trace | {"stage": "trained", "version": sample["version"], "step": sample["step"]}
        kept.append(sample["group"])
    raise ConfigError(
        f"group {group!r} is not in flight, not a dead letter, and not among the trained groups that are kept, the first of each "
        f"step (the newest: {', '.join(kept[:5]) or 'none yet'}); `sluice samples` and `sluice dead` list them"
    )


def newest_group(client: redis.Redis, keys: Keys) -> str:
    """Return a trained group of the newest step. Raises ConfigError where none is kept."""
    for sample in newest_samples(client, keys, count=1):
        return str(sample["group"])
    raise ConfigError("no trained group is kept yet: name one in flight, e.g. `sluice trace t0`")


def _trace(group: str, where: str, times: dict[str, float], work: dict[str, str]) -> dict[str, Any]:
    ordered = sorted(((at, stage) for stage, at in times.items()), key=lambda found: found[0])
    began = ordered[0][0] if ordered else 0.0
    before = [began] + [at for at, _ in ordered]
    stages = [
        {
            "stage": stage,
            "what": LABELS.get(stage, stage),
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
        for stage in (stage.name for stage in STAGES)
        if f"n:{stage}" in work
    ]
    return {"group": group, "where": where, "stages": stages, "assignments": assignments}


def heading_of(trace: dict[str, Any]) -> list[str]:
    """Return where a group is, at which stage or step, and its policy version."""
    stage = f"step {trace['step']}" if "step" in trace else f"stage {trace['stage']}"
    version = [] if trace["version"] is None else [f"policy version {trace['version']}"]
    return [f"group {trace['group']}", trace["where"], stage, *version]


def reasons_of(trace: dict[str, Any]) -> list[str]:
    """Return why a group was tried again or dead-lettered."""
    return [f"{name}: {trace[name]}" for name in ("dead_reason", "dead_detail", "last_error") if name in trace]


def render_trace(trace: dict[str, Any]) -> RenderableType:
    """Render a trace for a terminal."""
    head = plain_text(", ".join(heading_of(trace)), style="bold")
    tables = (table(stage_rows(trace)), table(assignment_rows(trace)))
    return Group(head, *tables, *(plain_text(reason) for reason in reasons_of(trace)))
