"""Sphinx extension: reference pages made from the code, so that they cannot fall behind it.

A page says `<!-- generated: configuration -->`, and the Markdown that the function of that name returns takes its place
when the site is built: configuration, sft, presets, commands, api, stages, redis_keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import click
import yaml
from api_page import api
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx

from sluice.common.config import Config
from sluice.common.config.presets import PRESETS, preset_values
from sluice.common.config.sft import SftConfig
from sluice.common.operations.control import CHANGEABLE
from sluice.common.pipeline import STAGES
from sluice.scripts.cli import cli

ROOT = Path(__file__).parent.parent
ROLES = ("workers", "trainer", "dashboard", "scripts", "common")
_BOUNDS = {annotated_types.Ge: ("ge", "at least"), annotated_types.Gt: ("gt", "over")}
_BOUNDS |= {annotated_types.Le: ("le", "at most"), annotated_types.Lt: ("lt", "under")}


def configuration() -> str:
    """Every section of a run's config, with the modules that read it."""
    return _sections(Config, readers=True)


def sft() -> str:
    """The same of `sluice sft`, but for the sections that both share."""
    return _sections(SftConfig, without=("model", "trainer"))


def _sections(root: type[BaseModel], *, readers: bool = False, without: tuple[str, ...] = ()) -> str:
    top = {name: field for name, field in root.model_fields.items() if not models_of(field)}
    parts = [_table(top, ""), ""]
    for name, field in root.model_fields.items():
        if models_of(field) and name not in without:
            parts += _section(name, field, f"Read in {_readers(name)}." if readers else "")
    return "\n".join(parts)


def _section(name: str, field: FieldInfo, note: str) -> list[str]:
    """A heading, what the section is, its keys; then the sections in it."""
    (model, is_list), *_ = models_of(field)
    key = f"{name}[]" if is_list else name
    text = _sentence(field.description) + (f" {note}" if note else "")
    parts = [f"## `{key}`", "", text, "", _table(model.model_fields, f"{key}."), ""]
    for child, inner in model.model_fields.items():
        if models_of(inner) and not _is_range(inner):
            parts += _section(f"{key}.{child}", inner, "")
    return parts


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        key = prefix + name
        meaning = _sentence(field.description)
        if key in CHANGEABLE:
            meaning += " *Changeable while the run continues.*"
        rows.append(f"| `{key}` | {type_of(field)} | {_default(field)} | {_cell(meaning)} |")
    return "\n".join(rows)


def models_of(field: FieldInfo) -> list[tuple[type[BaseModel], bool]]:
    """Sections in a field's type, and whether it is a list of them."""

    def walk(annotation: Any, is_list: bool) -> list[tuple[type[BaseModel], bool]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [(annotation, is_list)]
        inside = is_list or get_origin(annotation) is tuple
        return [found for inner in get_args(annotation) for found in walk(inner, inside)]

    return walk(field.annotation, False)


def _is_range(field: FieldInfo) -> bool:
    """A number or a range of them: the text says what a range is."""
    return int in get_args(field.annotation) and bool(models_of(field))


def type_of(field: FieldInfo) -> str:
    """In words, with bounds."""
    bounds = [
        f"{_BOUNDS[type(m)][1]} {getattr(m, _BOUNDS[type(m)][0]):g}" for m in field.metadata if type(m) in _BOUNDS
    ]
    if _is_range(field):
        return "integer, or `{min, max}`"
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("none" if inner is NoneType else _words(inner) for inner in arguments)
    if origin is tuple:
        inner = [_words(a) for a in arguments if a is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "boolean"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value in (None, (), {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return _cell(f"`{list(value) if isinstance(value, tuple) else value}`")


def _sentence(text: str | None) -> str:
    assert text, "every field has a sentence"
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _readers(section: str) -> str:
    """Modules in which `config.<section>` stands."""
    pattern = re.compile(rf"config\.{section}\b")
    files = [path for role in ROLES for path in sorted((ROOT / role).rglob("*.py")) if pattern.search(path.read_text())]
    return ", ".join(f"`{path.relative_to(ROOT).as_posix()}`" for path in files if not path.name.startswith("config"))


def presets() -> str:
    """What each preset sets, as YAML of the section `trainer`."""
    values = {name: {"trainer": preset_values(name, max_res_tokens=1024)} for name in PRESETS}
    return "\n".join(
        f"```yaml\n# trainer.preset: {name}\n{yaml.safe_dump(value, sort_keys=False)}```\n"
        for name, value in values.items()
    )


def commands() -> str:
    """Every command with its arguments, options and example."""
    parts = []
    for path, command in walk(cli, "sluice"):
        if path == "sluice":
            continue
        context = click.Context(command, info_name=path)
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts += [f"## `{path}`", "", _sentence(command.help), "", "```text", " ".join(usage.split()), "```", ""]
        helps = [p.get_help_record(context) for p in command.params]
        rows = [f"| `{_cell(option)}` | {_cell(_sentence(text))} |" for option, text in filter(None, helps) if text]
        parts += ["| option | |", "|---|---|", *rows, ""] if rows else []
        parts += [f"```bash\n{example_of(command)}\n```", ""] if command.epilog else []
    return "\n".join(parts)


def example_of(command: click.Command) -> str:
    """What the help shows below `Example:`."""
    _, _, lines = (command.epilog or "").partition("Example:")
    return "\n".join(line.strip() for line in lines.splitlines() if line.strip("\b \n"))


def walk(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    """(what one types, command) of a command and those below it."""
    below = command.commands.items() if isinstance(command, click.Group) else ()
    return [(path, command), *(found for name, child in sorted(below) for found in walk(child, f"{path} {name}"))]


def stages() -> str:
    """The table of stages (common/pipeline.py)."""
    rows = ["| stage | waits for | workers on queue | Celery task | pool |", "|---|---|---|---|---|"]
    for stage in STAGES:
        when = f", where `{stage.needed_with}` is set and not 0" if stage.needed_with else ""
        queues = f"`{stage.queue}`" + (f", evaluations: `{stage.eval_queue}`" if stage.eval_queue else "")
        size = f"`{stage.section}.concurrency`" if stage.section else "1"
        after = " and ".join(stage.waits_for) or "admission"
        rows.append(f"| {stage.name} | {after}{when} | {queues} | `{stage.celery_task}` | {stage.pool}, {size} |")
    return "\n".join(rows)


def redis_keys() -> str:
    """The key layout, which is the comment on top of common/ledger/lua/prelude.lua, as a table between its paragraphs."""
    text = (ROOT / "common" / "ledger" / "lua" / "prelude.lua").read_text().partition("\n\n")[0]
    before, layout, *after = re.split(r"^--\n", text, flags=re.M)
    joined = re.sub(r"\n-- {10,}", " ", layout)
    kind = "(?:hash|z?set|list|string|stream)"
    rows = re.findall(rf"^-- +(\S.*?) {{2,}}({kind}(?:, {kind})*)?:? *(.*)", joined, flags=re.M)
    table = ["| key | type | what it holds |", "|---|---|---|"]
    table += [f"| `{name}` | {kind} | {_plain(what)} |" for name, kind, what in rows]
    paragraphs = [_plain(" ".join(re.sub("^--", "", part, flags=re.M).split())) for part in (before, *after)]
    return "\n\n".join([paragraphs[0], "\n".join(table), *paragraphs[1:]])


def _plain(text: str) -> str:
    return _cell(text).replace("<", "&lt;")


PAGES = {page.__name__: page for page in (configuration, sft, presets, commands, api, stages, redis_keys)}


def insert(app: Sphinx, docname: str, content: list[str]) -> None:
    """Handler of source-read."""
    content[0] = re.sub(r"<!-- generated: (\w+) -->", lambda match: PAGES[match[1]](), content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
