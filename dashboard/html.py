"""Pieces of HTML that pages show. Everything that comes from a run goes through `escape`: completions are hostile text."""

from __future__ import annotations

from html import escape
from typing import Any


def tiles_html(name: str, status: dict[str, Any], tiles: list[tuple[str, str]]) -> str:
    """Return a run's name, status, numbers and alarms."""
    head = f'<h2>{escape(name)} <span class="status {escape(status["status"])}">{escape(status["status"])}</span></h2>'
    numbers = "".join(
        f'<div class="tile"><div class="name">{escape(label)}</div>'
        f'<div class="value {"bad" if value == "BROKEN" else ""}" data-tile="{escape(label)}">{escape(value)}</div></div>'
        for label, value in tiles
    )
    wrong = [f"stalled: {status['stalled_by']}"] if status["stalled_by"] else []
    return f'{head}<div class="tiles">{numbers}</div>{alarms_html([*wrong, *status["alarms"]])}'


def alarms_html(texts: list[str]) -> str:
    """Return one line per alarm."""
    return "".join(f'<div class="alarm">{escape(text)}</div>' for text in texts)


def table_html(rows: list[dict[str, Any]]) -> str:
    """Return a table of rows with the same keys, without columns that are empty in all rows."""
    names = [name for name in (rows[0] if rows else {}) if any(row[name] not in ("", None) for row in rows)]
    if not names:
        return "none"
    is_number = {name: all(isinstance(row[name], int | float) or row[name] == "" for row in rows) for name in names}
    head = "".join(f"<th{_number(is_number[name])}>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(_cell(name, row[name], is_number=is_number[name]) for name in names) + "</tr>" for row in rows
    )
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(name: str, value: Any, *, is_number: bool) -> str:
    text = f"{value:,}" if isinstance(value, int) and name not in ("version", "step") else str(value)
    if is_number:
        return f'<td class="n">{escape(text)}</td>'
    kind = "text" if name in ("note", "why", "change", "dropped", "dead", "detail", "held by") else ""
    kind += " bad" if value == "BROKEN" or name == "note" else ""
    return f'<td class="{kind}">{escape(text)}</td>'


def _number(is_number: bool) -> str:
    return ' class="n"' if is_number else ""
