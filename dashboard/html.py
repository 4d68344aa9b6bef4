"""Pieces of HTML that pages show. Everything that comes from a run goes through `escape`: completions are hostile text."""

from __future__ import annotations

from html import escape
from typing import Any

from sluice.dashboard.rows import Rows, cell_text, columns_of, stalled_text


def tiles_html(name: str, status: dict[str, Any], tiles: list[tuple[str, str]]) -> str:
    """Return a run's name, status, numbers and alarms."""
    head = f'<h2>{escape(name)} <span class="status {escape(status["status"])}">{escape(status["status"])}</span></h2>'
    numbers = "".join(
        f'<div class="tile"><div class="name">{escape(label)}</div>'
        f'<div class="value {"bad" if value == "BROKEN" else ""}" data-tile="{escape(label)}">{escape(value)}</div></div>'
        for label, value in tiles
    )
    wrong = [f"failed: {status['failure']}"] if status["failure"] else []
    wrong += [stalled_text(status)] if status["stalled_by"] else []
    return f'{head}<div class="tiles">{numbers}</div>{alarms_html([*wrong, *status["alarms"]])}'


def alarms_html(texts: list[str]) -> str:
    """Return one line per alarm."""
    return "".join(f'<div class="alarm">{escape(text)}</div>' for text in texts)


def table_html(rows: Rows) -> str:
    """Return a table of rows with the same keys, without columns that are empty in all rows."""
    columns = columns_of(rows)
    if not columns:
        return "none"
    numbers = {name: ' class="n"' if is_number else "" for name, is_number in columns.items()}
    head = "".join(f"<th{number}>{escape(name)}</th>" for name, number in numbers.items())
    body = "".join(
        "<tr>" + "".join(_cell(name, row[name], number) for name, number in numbers.items()) + "</tr>" for row in rows
    )
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(name: str, value: Any, number: str) -> str:
    kind = "text" if name in ("note", "why", "what", "dropped", "dead", "detail", "held by") else ""
    kind += " bad" if value in ("BROKEN", "killed", "ended") or name == "note" else ""
    return f"<td{number or f' class={kind!r}'}>{escape(cell_text(name, value))}</td>"
