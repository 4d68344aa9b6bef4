"""Prompts made of the columns of a row: `"Reverse: {word}"`. `{{` and `}}` are braces."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names, in order. Raises ValueError."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; write {{column}} for a column, {{{{ and }}}} for braces") from None
    columns = []
    for _, name, format_spec, conversion in parts:
        if name is None:
            continue
        if not name or format_spec or conversion:
            written = f"{name}{'!' * bool(conversion)}{conversion or ''}{':' * bool(format_spec)}{format_spec or ''}"
            raise ValueError(
                f"{template!r}: {{{written}}} names no column; write {{column}}, and {{{{ and }}}} for braces"
            )
        columns.append(name)
    if not columns:
        raise ValueError(f"{template!r} names no column, so all prompts would be the same: write {{column}}")
    return list(dict.fromkeys(columns))


def fill_template(template: str, cells: Mapping[str, str]) -> str:
    """Put the text of each column in its place. What a cell holds is never read as a template."""
    return "".join(text + ("" if name is None else cells[name]) for text, name, _, _ in Formatter().parse(template))
