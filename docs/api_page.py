"""The reference of what a program may import, made from signatures and docstrings (docs/reference/api.md)."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import sluice

WIDTH = 100
SECTIONS: dict[str, tuple[str, ...]] = {
    "From a program": tuple(f"sluice:{name}" for name in getattr(sluice, "__all__", ())),
    "Rewards": (
        "sluice.workers.rewards:MathReward",
        "sluice.workers.rewards:ThinkingReward",
        "sluice.workers.rewards:CodeReward",
        "sluice.workers.sandbox:run_python",
        "sluice.workers.sandbox:Outcome",
    ),
    "Losses and advantages": ("sluice.trainer.loss:LossInputs", "sluice.trainer.loss:policy_loss"),
    "Weight transports": ("sluice.common.policies.transports:Transport",),
    "Errors": ("sluice.common.errors",),
}
"""Heading -> what it documents: `module:name`, or a module, whose docstring says all."""


def api() -> str:
    """Return every section with its entries."""
    parts = []
    for heading, entries in SECTIONS.items():
        parts += [f"## {heading}", "", *(text for entry in entries for text in (_entry(entry), ""))] if entries else []
    return "\n".join(parts)


def _entry(entry: str) -> str:
    module, _, name = entry.partition(":")
    if not name:
        return f"```text\n{inspect.getdoc(importlib.import_module(module))}\n```"
    found = getattr(importlib.import_module(module), name)
    title = f"### `{module}.{name}`\n"
    if inspect.isclass(found):
        return "\n".join([title, *_class(name, found)])
    return "\n".join([title, _code(_signature(name, found)), "", _text(found)])


def _class(name: str, found: type) -> Iterator[str]:
    """Its signature, unless it is made by Sluice alone; what it is, its fields, its methods."""
    is_record = dataclasses.is_dataclass(found)
    if not is_record and not getattr(found, "_is_protocol", False) and "__init__" in vars(found):
        yield _code(_signature(name, found))
        yield ""
    yield _text(found)
    fields = _fields(found)
    if fields:
        yield from ("", "| | |", "|---|---|", *(f"| `{field}` | {_cell(text)} |" for field, text in fields.items()))
    for method, made in inspect.getmembers_static(found):
        if method.startswith("_") or method in fields or not inspect.getdoc(made):
            continue
        shown = f".{method}" if isinstance(made, property) else _signature(f".{method}", getattr(found, method))
        yield from ("", _code(shown), "", _text(made))


def _fields(found: type) -> dict[str, str]:
    """Return attributes whose declaration is followed by a string, with that string."""
    body = ast.parse(textwrap.dedent(inspect.getsource(found))).body[0].body  # type: ignore[attr-defined]
    return {
        declared.target.id: " ".join(text.value.value.split())
        for declared, text in itertools.pairwise(body)
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _signature(name: str, found: Any) -> str:
    """Return it in one line where that fits, else a line for each parameter."""
    signature = inspect.signature(found)
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    text = f"{name}{signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))}"
    if len(text) <= WIDTH:
        return text
    inside, _, returns = text.removeprefix(f"{name}(").rpartition(")")
    listed = "".join(f"    {part},\n" for part in _split(inside))
    return f"{name}(\n{listed}){returns}"


class _Written(str):
    """An annotation as it is written: `inspect` shows text in quotes."""

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: Any) -> Any:
    return _Written(annotation) if isinstance(annotation, str) else annotation


def _split(parameters: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _text(found: Any) -> str:
    """Return the docstring as Markdown: its indented blocks are code there as well."""
    return re.sub(r"`[^`]*`|<(?=\w)", lambda part: "&lt;" if part[0] == "<" else part[0], inspect.getdoc(found) or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
