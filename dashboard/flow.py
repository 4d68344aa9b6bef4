"""The pipeline as the data flows: each stage with its workers, on the arrows what waits and how fast groups pass."""

from __future__ import annotations

from html import escape
from statistics import fmean
from typing import Any

from sluice.common.pipeline import Stage, stages_for
from sluice.dashboard.rows import number
from sluice.dashboard.snapshots import Snapshot


def flow_html(snapshot: Snapshot) -> str:
    """Return the stages in columns, parallel ones one below the other, then buffer, trainer and the way back."""
    stages = stages_for(snapshot.config)
    columns = []
    for depth in range(1 + max(_depth(stage, stages) for stage in stages)):
        lanes = [_lane(snapshot, stage.queue, stage) for stage in stages if _depth(stage, stages) == depth]
        if snapshot.status["queues"].get("eval") or _workers(snapshot, "eval"):
            lanes += [_lane(snapshot, s.eval_queue, s) for s in stages if s.eval_queue and _depth(s, stages) == depth]
        columns.append(f'<div class="lanes">{"".join(lanes)}</div>')
    return f'<div class="flow">{"".join(columns)}{_buffer(snapshot)}{_trainer(snapshot)}</div>{_way_back(snapshot)}'


def _depth(stage: Stage, stages: tuple[Stage, ...]) -> int:
    before = [other for other in stages if other.name in stage.waits_for]
    return 1 + max(_depth(other, stages) for other in before) if before else 0


def _lane(snapshot: Snapshot, queue: str, stage: Stage) -> str:
    """Return the arrow into a stage and the stage."""
    status, workers = snapshot.status, _workers(snapshot, queue)
    waiting, oldest_s = status["queues"].get(queue, 0), status.get("oldest_age_s", {}).get(queue)
    arrow = _arrow(f"{waiting:,} waiting" if waiting else "", f"{oldest_s:.1f} s" if waiting and oldest_s else "")
    busy = [1 - stats["idle_fraction"] for stats in workers if "idle_fraction" in stats]
    speed = sum(stats.get("tokens_per_s", 0.0) for stats in workers)
    lines = [
        f"{len(workers)} worker{'' if len(workers) == 1 else 's'}" + (f", {fmean(busy):.0%} busy" if busy else ""),
        f"{number(snapshot.rates.get(queue), '.1f')} groups/s" + (f", {speed:,.0f} tokens/s" if speed else ""),
    ]
    is_missing = not workers and status["status"] == "running" and bool(status["queues"].get(queue))
    return f'<div class="lane">{arrow}{_node(queue, lines, is_bad=is_missing)}</div>'


def _buffer(snapshot: Snapshot) -> str:
    metrics, train = snapshot.status["metrics"], snapshot.status["ledger"].get("train", {})
    held = metrics.get("buffer/bytes")
    lines = [
        f"{number(metrics.get('buffer/groups'), ',.0f')} ready",
        f"{train.get('in_flight', 0):,} in flight" + ("" if held is None else f", {held / 2**20:,.1f} MiB"),
    ]
    return f'<div class="lane">{_arrow("", "")}{_node("buffer", lines)}</div>'


def _trainer(snapshot: Snapshot) -> str:
    status, workers = snapshot.status, _workers(snapshot, "trainer")
    idle = next((stats["idle_fraction"] for stats in workers if "idle_fraction" in stats), None)
    lines = [
        f"step {status['step']:,}" + ("" if idle is None else f", {1 - idle:.0%} busy"),
        f"{number(status['trained_tokens_per_s'], ',.0f')} tokens/s",
    ]
    is_missing = not workers and status["status"] == "running"
    arrow = _arrow(f"{number(snapshot.rates.get('trained'), '.1f')} groups/s", "")
    return f'<div class="lane">{arrow}{_node("trainer", lines, is_bad=is_missing)}</div>'


def _way_back(snapshot: Snapshot) -> str:
    """Return the line from the trainer back to those that load its policies."""
    status, metrics = snapshot.status, snapshot.status["metrics"]
    size, seconds = metrics.get("policy/payload_bytes"), metrics.get("time/publish")
    parts = [f"policy version {status['policy']['version'] or '-'}"]
    parts += [f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"] if size else []
    parts += [f"published in {seconds:.2f} s"] if seconds else []
    return f'<div class="back"><span>{escape(", ".join(parts))}</span></div>'


def _arrow(above: str, below: str) -> str:
    return f'<div class="arrow"><span>{escape(above)}</span><i></i><span>{escape(below)}</span></div>'


def _node(name: str, lines: list[str], *, is_bad: bool = False) -> str:
    body = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f'<div class="node{" missing" if is_bad else ""}"><b>{escape(name)}</b>{body}</div>'


def _workers(snapshot: Snapshot, role: str) -> list[dict[str, Any]]:
    return [stats for stats in snapshot.status["processes"].values() if role in stats["role"].split(",")]
