"""`sluice init`: a first `run.yaml` and `rewards.py`, for a task of one's own, from what is asked for or given as flags."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from sluice.common.config import PromptConfig
from sluice.common.errors import ConfigError
from sluice.common.paths import expanded
from sluice.scripts.commands.run import TINY, prepare_tiny
from sluice.scripts.first_task import DEFAULT_MODELS, TASKS, FirstTask
from sluice.scripts.options import UserPath, example

_PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input", "messages", "text")
_TARGETS = ("target", "answer", "solution", "output", "response", "completion", "label")
"""Names of columns, the likeliest first."""


@click.command(
    epilog=example(
        "sluice init && sluice run run.yaml",
        "sluice init my_task --task math --model Qwen/Qwen3-0.6B --data rows.jsonl",
        "sluice init --task custom --yes",
    )
)
@click.argument("folder", default=".", type=UserPath(file_okay=False, path_type=Path))
@click.option("--task", type=click.Choice([*TASKS]), help="What is rewarded; default: math.")
@click.option("--model", help="Hub id or folder; default: the tiny model for the example's rows, else a small one.")
@click.option("--data", help="File, folder or hub id; default: rows of an example.")
@click.option("--yes", is_flag=True, help="Ask nothing: take the defaults of what is not given.")
def init(folder: Path, task: str | None, model: str | None, data: str | None, yes: bool) -> None:
    """Write run.yaml and rewards.py for a task of your own, or an example that learns. Overwrites nothing."""
    is_asked = not yes and sys.stdin.isatty()
    task = task or (_ask_task() if is_asked else "math")
    if data is None and is_asked:
        data = click.prompt("Data: file, folder or hub id; empty: an example", default="", show_default=False, err=True)
    is_tiny = not data and not model and task != "code"
    if not model and not is_tiny:
        model = DEFAULT_MODELS[task]
        model = click.prompt("Model: hub id or folder", default=model, err=True) if is_asked else model
    made = FirstTask(
        task=task,
        model=_seen_from(folder, model or str(TINY / "model")),
        dataset={"path": _seen_from(folder, data), **_columns(data, is_code=task == "code")} if data else None,
        is_tiny=is_tiny,
        is_table=not data or expanded(data).exists(),
    )
    files = made.files()
    for name in files:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name} exists, and init overwrites nothing: name another folder, or move it away"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if is_tiny:
        prepare_tiny(folder / TINY)
    for name, text in files.items():
        (folder / name).write_text(text)
    into = "" if folder == Path() else f"  cd {folder}\n"
    click.echo(
        f"{', '.join(files)} in {folder.resolve()}; next:\n{into}"
        "  sluice data run.yaml      the prompts as training sees them\n"
        "  sluice doctor run.yaml    what is wrong, if anything is\n"
        "  sluice run run.yaml"
    )


def _ask_task() -> str:
    for name, what in TASKS.items():
        click.echo(f"  {name:8}{what}", err=True)
    return str(click.prompt("Task", type=click.Choice([*TASKS]), default="math", err=True))


def _seen_from(folder: Path, path: str) -> str:
    """Return a local path as a run that is started in the folder has to name it."""
    local = expanded(path)
    is_relative = local.exists() and not local.is_absolute() and not path.startswith("~")
    return os.path.relpath(local, folder) if is_relative and path != str(TINY / "model") else path


def _columns(data: str, *, is_code: bool) -> dict[str, Any]:
    """Return the keys that name the columns of a dataset, by the names in its first row. Raises ConfigError."""
    from sluice.common.data.rows import open_rows  # datasets loads here

    is_local = expanded(data).exists()
    try:
        config = PromptConfig(path=data, streaming=not is_local, shuffle=False)
        with closing(open_rows(config, seed=0, section="--data")) as rows:
            row, _ = rows.row_at(0)
    except ConfigError as error:
        if is_local or expanded(data).suffix:
            raise
        click.echo(f"{error}. run.yaml may need dataset.name and other columns", err=True)
        return {"prompt_column": "prompt", "target_column": None if is_code else "target"}
    target = None if is_code else next((name for name in _TARGETS if name in row), None)
    others = [name for name in row if name != target]
    prompt = next((name for name in [*_PROMPTS, *others] if name in others), None)
    if prompt is None:
        raise ConfigError(f"--data {data} has the one column {target}: a row needs a prompt as well")
    found = {"prompt_column": prompt, "target_column": target}
    return {**found, "target_delimiter": "#### "} if "\n#### " in str(row.get(target or "")) else found
