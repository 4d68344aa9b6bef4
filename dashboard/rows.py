"""Tables about a run: rows with the same keys, which the web page and the terminal both show."""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import datetime
from typing import Any

from sluice.common.monitoring.printable import printable
from sluice.common.pipeline import QUEUES, ROLES

Rows = list[dict[str, Any]]


def columns_of(rows: Rows) -> dict[str, bool]:
    """Return the columns that are not empty in all rows -> whether they hold numbers."""
    names = [name for name in (rows[0] if rows else {}) if any(row[name] not in ("", None) for row in rows)]
    return {name: all(isinstance(row[name], int | float) or row[name] == "" for row in rows) for name in names}


def cell_text(name: str, value: Any) -> str:
    """Return the text of one cell of a column."""
    is_count = isinstance(value, int) and name not in ("version", "step", "pid")
    return f"{value:,}" if is_count else printable(str(value))


def stalled_text(status: dict[str, Any]) -> str:
    """Say why a run makes no step."""
    return f"{'starting' if status['stall_kind'] == 'starting' else 'stalled'}: {status['stalled_by']}"


def ledger_rows(status: dict[str, Any]) -> Rows:
    """Return one row of counters per kind."""
    return [
        {
            "set": kind,
            "identity": "holds" if counters["holds"] else "BROKEN",
            "admitted": counters["admitted"],
            "settled": f"{settled} {counters[settled]:,}",
            "dropped": _reasons(counters["dropped"]),
            "dead": _reasons(counters["dead"]),
            "in flight": counters["in_flight"],
            "retried": counters["retried"],
            "resent": counters["resent"],
            "refused": counters["refused"],
        }
        for kind, counters in status["ledger"].items()
        for settled in ["scored" if kind == "eval" else "trained"]
    ]


def process_rows(status: dict[str, Any]) -> Rows:
    """Return one row for each process that sends heartbeats, and one for each role without any."""
    rows = []
    for role in ROLES:
        mine = {name: stats for name, stats in status["processes"].items() if stats["role"] == role}
        for name, stats in (mine or {"-": {}}).items():
            idle = stats.get("idle_fraction")
            rows.append(
                {
                    "role": role,
                    "process": name,
                    "host": stats.get("host") or name.partition("@")[2].rpartition(":")[0],
                    "device": stats.get("device", ""),
                    "version": stats.get("version", ""),
                    "digest": stats.get("digest", ""),
                    "tokens/s": number(stats.get("tokens_per_s"), ",.0f", otherwise=""),
                    "busy": "" if idle is None else f"{1 - idle:.0%}",
                    "running": stats.get("running", ""),
                    "done": stats.get("done", ""),
                    "up": _duration(stats.get("up_s")),
                    "heartbeat": ago(stats.get("silent_s"), otherwise=""),
                    "note": stats.get("alarm") or "",
                }
            )
    return rows


def queue_rows(status: dict[str, Any]) -> Rows:
    """Return one row per queue, with the result of autoscaling."""
    live = [stats["role"] for stats in status["processes"].values()]
    return [
        {
            "queue": queue,
            "waiting": status["queues"][queue],
            "oldest": _duration(status["oldest_age_s"][queue]),
            "workers": live.count(queue),
            "wanted": status["desired_replicas"].get(queue, ""),
            "why": status["desired_because"].get(queue, ""),
        }
        for queue in QUEUES
    ]


def event_rows(events: list[dict[str, str]]) -> Rows:
    """Return one row per event, newest first."""
    return [
        {
            "at": f"{datetime.fromtimestamp(float(event['at'])):%m-%d %H:%M:%S}",
            "step": event["step"],
            "event": event["event"],
            "what": event_text(event),
        }
        for event in reversed(events)
    ]


def event_text(event: dict[str, str]) -> str:
    """Say what happened."""
    known = defaultdict(lambda: "?", event)
    match event["event"]:
        case "killed" | "ended":
            return f"{known['process']} {known['how']}"
        case "restarted":
            return f"{known['process']} was started again"
        case "setting":
            return f"{known['key']}: {known['old']} → {known['new']}, by {known['who']}"
        case "scaled":
            return f"{known['queue']} workers {known['from']} → {known['to']}: {known['reason']}"
        case _:
            return f"of step {event['step']}"


def stage_rows(trace: dict[str, Any]) -> Rows:
    """Return one row per stage that a group has reached."""
    return [
        {
            "stage": stage["what"],
            "at": f"{datetime.fromtimestamp(stage['at']):%Y-%m-%d %H:%M:%S.%f}"[:-3],
            "since start": f"{stage['since_start_s']:.3f} s",
            "since the one before": f"{stage['since_last_s']:.3f} s",
        }
        for stage in trace["stages"]
    ]


def assignment_rows(trace: dict[str, Any]) -> Rows:
    """Return one row per stage of a group that a worker has held."""
    return [{name.replace("_", " "): value for name, value in stage.items()} for stage in trace["assignments"]]


def number(value: float | None, form: str, *, otherwise: str = "-") -> str:
    """Format a number that may be unknown or not finite."""
    return format(value, form) if value is not None and math.isfinite(value) else otherwise


def ago(seconds: float | None, *, otherwise: str = "-") -> str:
    """Say how long ago something was."""
    return otherwise if seconds is None else f"{_duration(seconds)} ago"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items()) or "0"
