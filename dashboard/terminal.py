"""The screen of `sluice status`: what the web page shows, in a terminal."""

from __future__ import annotations

import math
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sluice.common.ledger.ledger import Counters
from sluice.common.operations.control import describe_paused
from sluice.common.pipeline import QUEUES, ROLES

_BARS = "▁▂▃▄▅▆▇█"


def render(status: dict[str, Any], *, trouble: str = "") -> RenderableType:
    """Render a snapshot of `collect_status`. trouble: why it is not the newest."""
    title = Text(f"{status['run']}: {status['status']}, step {status['step']}/{status['num_steps']}", style="bold")
    if status["eta_s"] is not None:
        title.append(f", {timedelta(seconds=round(status['eta_s']))} to go", style="default")
    title.append(f", policy version {status['policy']['version'] or '-'}", style="default")
    if status["dashboard"]:
        title.append(f"\n{status['dashboard']}", style="cyan")
    for line in _control_state(status):
        title.append(f"\n{line}", style="yellow")
    if status["stalled_by"]:
        title.append(f"\nstalled: {status['stalled_by']}", style="bold red")
    for alarm in [*status["alarms"], *([trouble] if trouble else [])]:
        title.append(f"\nalarm: {alarm}", style="red")
    return Group(title, _numbers(status), _ledger(status), _queues(status), _processes(status))


def sparkline(values: list[float], *, width: int = 40) -> str:
    """Return values as a row of bars, averaged down to `width`."""
    values = [v for v in values if math.isfinite(v)]
    size = max(1, math.ceil(len(values) / width))
    means = [fmean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_BARS[round((v - low) / ((high - low) or 1.0) * (len(_BARS) - 1))] for v in means)


def _control_state(status: dict[str, Any]) -> list[str]:
    """Describe the control state that operators have set."""
    lines = [describe_paused(status["paused"])] if status["paused"] else []
    if status["draining"]:
        lines.append(f"draining, ordered by {status['draining']['who']}: it ends when what is in flight is trained")
    if status["settings"]:
        lines.append("set since: " + " ".join(f"{key}={value}" for key, value in status["settings"].items()))
    return lines


def _numbers(status: dict[str, Any]) -> Text:
    metrics = status["metrics"]
    shown = [
        ("reward", status["reward"], "{:.3f} " + sparkline(status["rewards"], width=20)),
        ("policy age", status["policy_age"], "{:.2f}"),
        ("generated", status["generated_tokens_per_s"], "{:,.0f} tokens/s"),
        ("trained", status["trained_tokens_per_s"], "{:,.0f} tokens/s"),
        ("last step", status["age_of_last_step_s"], "{:.1f} s ago"),
        ("ESS", metrics.get("off_policy/ess"), "{:.3f}"),
        ("mismatch KL", metrics.get("off_policy/mismatch_kl"), "{:.2g}"),
        ("masked", metrics.get("off_policy/masked_fraction"), "{:.1%}"),
        ("waiting for a batch", metrics.get("time/wait_for_batch"), "{:.2f} s"),
        ("publication", metrics.get("time/publish"), "{:.2f} s"),
    ]
    for name, value in metrics.items():
        if name.startswith("eval/") and "@" in name.rpartition("/")[2] and not name.endswith("_stderr"):
            shown.append((name.removeprefix("eval/"), value, "{:.3f}"))
    known = ((name, value, form) for name, value, form in shown if value is not None and math.isfinite(value))
    return Text("   ".join(f"{name} {form.format(value)}" for name, value, form in known))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _ledger(status: dict[str, Any]) -> Table:
    table = _table("ledger")
    columns = ["settled", "in_flight", "dropped", "dead", "retried", "resent", "refused"]
    for name in ("set", "admitted", *columns, "identity"):
        table.add_column(name, justify="right")
    for kind, counters in status["ledger"].items():
        if kind == "train" or counters["admitted"]:
            settled = counters["scored" if kind == "eval" else "trained"]
            values = [_count({**counters, "settled": settled}[name]) for name in columns]
            table.add_row(kind, _count(counters["admitted"]), *values, "holds" if counters["holds"] else "BROKEN")
    return table


def _count(value: int | dict[str, int]) -> str:
    """Format a number, or one for each reason."""
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(f"{reason} {number:,}" for reason, number in value.items()) or "0"


def _queues(status: dict[str, Any]) -> Table:
    table = _table("queues")
    for name in ("queue", "waiting", "oldest", "workers", "wanted"):
        table.add_column(name, justify="left" if name == "queue" else "right")
    roles = [stats["role"] for stats in status["processes"].values()]
    for queue in QUEUES:
        oldest = status["oldest_age_s"][queue]
        wanted = status["desired_replicas"].get(queue, "")
        cells = [f"{oldest:.1f} s" if oldest else "", str(roles.count(queue)), str(wanted)]
        table.add_row(queue, f"{status['queues'][queue]:,}", *cells)
    return table


def _processes(status: dict[str, Any]) -> Table:
    table = _table("processes")
    columns = "role process device version digest tokens/s busy running done up heartbeat note"
    for name in columns.split():
        table.add_column(name)
    for role in ROLES:
        mine = [(name, stats) for name, stats in status["processes"].items() if stats["role"] == role]
        for name, stats in mine:
            cells = [str(stats.get(key, "")) for key in ("device", "version", "digest")]
            speed = f"{stats['tokens_per_s']:,.0f}" if stats.get("tokens_per_s") is not None else ""
            busy = f"{1 - stats['idle_fraction']:.0%}" if stats.get("idle_fraction") is not None else ""
            work = [str(stats.get(key, "")) for key in ("running", "done")]
            up = str(timedelta(seconds=round(stats["up_s"]))) if "up_s" in stats else ""
            heartbeat = f"{stats['silent_s']:.0f} s ago"
            table.add_row(role, name, *cells, speed, busy, *work, up, heartbeat, str(stats.get("alarm") or ""))
        if not mine:
            table.add_row(role, "-")
    return table


def ledger_text(counters: Counters) -> str:
    """Write out the identity."""
    dropped = "".join(f" + dropped({reason}) {count}" for reason, count in counters.dropped.items())
    dead = "".join(f" + dead({reason}) {count}" for reason, count in counters.dead.items())
    settled = "scored" if counters.kind == "eval" else "trained"
    count = counters.scored if counters.kind == "eval" else counters.trained
    verdict = "holds" if counters.holds else f"BROKEN: the right side is {counters.settled + counters.in_flight}"
    return (
        f"admitted {counters.admitted} = {settled} {count}{dropped}{dead} + in_flight {counters.in_flight}: {verdict}"
    )
