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
from sluice.dashboard.rows import Rows, cell_text, columns_of, ledger_rows, process_rows, queue_rows

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
    return Group(
        title,
        _numbers(status),
        table(ledger_rows(status), title="ledger"),
        table(queue_rows(status), title="queues", hidden="why"),
        table(process_rows(status), title="processes", hidden="host"),
    )


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


def table(rows: Rows, *, title: str | None = None, hidden: str = "") -> RenderableType:
    """Render rows with the same keys, without columns that are empty in all rows and one that is too wide for a terminal."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    columns = {name: is_number for name, is_number in columns_of(rows).items() if name != hidden}
    for name, is_number in columns.items():
        shown.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell_text(name, row[name])) for name in columns))
    return shown


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
