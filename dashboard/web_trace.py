"""The page of one group's history, as a waterfall: what it waited for, and what was done with it when."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import quote

import redis
from fastapi import Request
from nicegui import run, ui

from sluice.common.errors import SluiceError
from sluice.common.pipeline import STAGES
from sluice.dashboard.html import alarms_html, table_html
from sluice.dashboard.rows import assignment_rows, stage_rows
from sluice.dashboard.snapshots import Reader
from sluice.dashboard.trace import heading_of, read_trace, reasons_of


async def trace_page(reader: Reader, request: Request) -> None:
    """Draw one group's history."""
    name, group = (request.query_params.get(key, "") for key in ("run", "group"))
    with ui.element("div").classes("page"):
        field = ui.input("group", value=group, placeholder="t7").props("dense outlined").style("max-width: 260px")
        field.on("keydown.enter", lambda: ui.navigate.to(f"/trace?run={quote(name)}&group={quote(field.value)}"))
        if group:
            content = await run.io_bound(_trace_html, reader, group) or ""
            ui.html(content, sanitize=False).style("display: contents")


def _trace_html(reader: Reader, group: str) -> str:
    try:
        with reader.opened() as (client, opened):
            trace = read_trace(client, opened.keys, group)
    except (SluiceError, redis.RedisError) as error:
        return alarms_html([str(error)])
    return (
        f'<div class="card"><h2>{escape(" · ".join(heading_of(trace)))}</h2>{waterfall_html(trace)}'
        f"{alarms_html(reasons_of(trace))}</div>"
        f'<div class="card"><h2>times</h2><div class="scroll">{table_html(stage_rows(trace))}</div></div>'
        f'<div class="card"><h2>workers</h2><div class="scroll">{table_html(assignment_rows(trace))}</div></div>'
    )


def spans_of(trace: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Return per stage (name, seconds from the start to when it could begin, to when it began, to its end), in order.

    A stage that is not finished ends at the newest time known. The last span is the time in the buffer.
    """
    times = {stage["stage"]: stage["since_start_s"] for stage in trace["stages"]}
    last = max(times.values(), default=0.0)
    spans = []
    for stage in STAGES:
        began, ended = times.get(f"{stage.name}_started"), times.get(stage.name)
        if began is None and ended is None:
            continue
        could = max((times.get(name, 0.0) for name in stage.waits_for), default=0.0)
        end = last if ended is None else ended
        start = end if began is None else began
        spans.append((stage.name, min(could, start), start, max(start, end)))
    if "ready" in times:
        spans.append(("buffer", times["ready"], times["ready"], times.get("leased", last)))
    return spans


def waterfall_html(trace: dict[str, Any]) -> str:
    """Return one row per stage: a pale bar while it waited, a full one while it was worked on."""
    spans = spans_of(trace)
    total = max((end for *_, end in spans), default=0.0) or 1.0
    held = {stage["stage"]: stage["held_by"] for stage in trace["assignments"]}
    rows = []
    for name, could, start, end in spans:
        left, wait, work = (100 * seconds / total for seconds in (could, start - could, end - start))
        kind = "rest" if name == "buffer" else "work"
        bars = f'<i class="wait" style="left:{left:.2f}%;width:{wait:.2f}%"></i>'
        bars += f'<i class="{kind}" style="left:{left + wait:.2f}%;width:max(2px, {work:.2f}%)"></i>'
        told = f"{end - start:.3f} s" + (f" after {start - could:.3f} s" if start - could >= 0.0005 else "")
        by = f'<span class="by">{escape(held[name])}</span>' if held.get(name) else ""
        rows.append(f'<b>{escape(name)}</b><div class="track">{bars}</div><span>{told} {by}</span>')
    kinds = {"wait": "waiting", "work": "worked on", "rest": "in the buffer"}
    legend = "".join(f'<span><i class="{kind}"></i>{text}</span>' for kind, text in kinds.items())
    ticks = "".join(f"<span>{seconds:.2f} s</span>" for seconds in (0, total / 2, total))
    scale = f'<b></b><div class="scale">{ticks}</div><span></span>'
    return (
        f'<div class="waterfall">{"".join(rows)}{scale}</div><div class="legend falls">{legend}</div>' if rows else ""
    )
