"""The screen of `sluice status`: what the web page shows, in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sluice.common.ledger.ledger import Counters
from sluice.common.monitoring.printable import printable
from sluice.common.operations.control import describe_paused
from sluice.dashboard.rows import Rows, cell_text, columns_of, ledger_rows, process_rows, queue_rows, stalled_text

_LEAST_IN_LEDGER = "refused", "resent", "retried"
_LEAST_OF_PROCESSES = "digest", "note", "device", "up", "running", "heartbeat", "done"
"""Columns that a narrow terminal does without, the first one first."""
_WORD = 15
"""Characters of a word up to which it is not broken in a column that may be."""
_BARS = "▁▂▃▄▅▆▇█"


class PrintableConsole(Console):
    """A console that escapes the control characters of what it prints: only its own colours and cursor moves act."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def render(status: dict[str, Any], *, trouble: str = "") -> RenderableType:
    """Render a snapshot of `collect_status`. trouble: why it is not the newest."""
    title = Text(f"{status['run']}: {status['status']}, step {status['step']}/{status['num_steps']}", style="bold")
    if status["eta_s"] is not None:
        title.append(f", {timedelta(seconds=round(status['eta_s']))} to go", style="default")
    title.append(f", policy version {status['policy']['version'] or '-'}", style="default")
    if status["dashboard"]:
        title.append(f"\n{status['dashboard']}", style="cyan")
    lines = [(line, "yellow") for line in _control_state(status)]
    lines += [(f"failed: {status['failure']}", "bold red")] if status["failure"] else []
    lines += [(stalled_text(status), "bold red")] if status["stalled_by"] else []
    alarms = [text for text in status["alarms"] if text != status["stalled_by"]] + ([trouble] if trouble else [])
    lines += [(f"alarm: {alarm}", "red") for alarm in alarms]
    for line, style in lines:
        title.append(f"\n{printable(line)}", style=style)
    return Group(
        title,
        _numbers(status),
        table(
            ledger_rows(status),
            title="ledger",
            hidden=_LEAST_IN_LEDGER,
            folds=("settled", "dropped", "dead", "in flight"),
        ),
        table([row | {"why": ""} for row in queue_rows(status)], title="queues", folds=()),
        table(_processes(status), title="processes", hidden=_LEAST_OF_PROCESSES, folds=("host", "device", "note")),
    )


def _processes(status: dict[str, Any]) -> Rows:
    """Return the rows of the processes by their pids, and by their hosts where there are several."""
    rows = process_rows(status)
    has_several = len({row["host"] for row in rows if row["host"]}) > 1
    left_out = {"role", "process", *(() if has_several else ("host",))}
    return [
        {"role": row["role"], "pid": row["process"].rpartition(":")[2]}
        | {name: row[name] for name in row if name not in left_out}
        for row in rows
    ]


def plain_text(text: str, style: str = "") -> Text:
    """Return text that may hold anything; rich by itself would drop some control characters and let others act."""
    return Text(printable(text), style)


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


def table(
    rows: Rows, *, title: str | None = None, hidden: tuple[str, ...] = (), folds: tuple[str, ...] | None = None
) -> RenderableType:
    """Render rows with the same keys, without columns that are empty in all rows.

    folds: the columns that may be broken into lines, none = all; the others stay whole, and those of `hidden` go, the first one
    first, where the terminal is too narrow for all.
    """
    return _Table(rows, title, hidden, folds)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that drops columns until it fits."""

    rows: Rows
    title: str | None
    hidden: tuple[str, ...]
    folds: tuple[str, ...] | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = columns_of(self.rows)
        for name in ("", *self.hidden):
            columns.pop(name, None)
            texts = {name: [name, *(cell_text(name, row[name]) for row in self.rows)] for name in columns}
            widths = {name: self._min_width(name, cells) for name, cells in texts.items()}
            left = options.max_width - sum(widths.values()) - 2 * len(columns)  # a gap is two wide
            if left >= 0:
                break
        shown = Table(title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        shown.collapse_padding = True
        for number, (name, is_number) in enumerate(columns.items(), start=1):
            needed = max(cell_len(line) for text in texts[name] for line in text.split("\n"))
            more = min(max(0, needed - widths[name]), max(0, left) if number == len(columns) else max(0, left) * 2 // 3)
            left -= more
            justify: JustifyMethod = "right" if is_number else "left"
            shown.add_column(name, justify=justify, overflow="fold", width=widths[name] + more)
        for cells in list(zip(*texts.values(), strict=True))[1:]:
            shown.add_row(*map(Text, cells))
        yield shown

    def _min_width(self, name: str, cells: list[str]) -> int:
        if self.folds is None or name in self.folds:
            cells = [word[:_WORD] for cell in cells for word in cell.split()]
        return max(map(cell_len, cells), default=1)


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
