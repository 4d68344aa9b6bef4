"""`sluice data`: the first prompts of a config, exactly as training will see them. Starts and stores nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.errors import ConfigError
from sluice.common.monitoring.printable import printable
from sluice.common.paths import with_absolute_paths
from sluice.scripts.options import ConfigFile, Overrides, echo_json, example


@click.command(epilog=example("sluice data quickstart", "sluice data my_run.yaml -n 100 --json"))
@ConfigFile
@Overrides
@click.option("-n", "number", type=click.IntRange(min=1), default=5, show_default=True, help="Prompts to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt and line.")
def data(config: str, overrides: tuple[str, ...], number: int, as_json: bool) -> None:
    """Show the first prompts as training will see them: text, token ids, target, columns, or what is wrong with the row."""
    is_any_usable = False
    for row in read_prompts(with_absolute_paths(load_config(config, list(overrides))), number):
        is_any_usable |= "error" not in row
        if as_json:
            row.pop("text", None)
            echo_json(row)
        else:
            click.echo(_lines(row))
    if not is_any_usable:
        raise ConfigError(f"{config}: none of the first {number} rows can be used: correct the first, then look again")


def read_prompts(config: Config, number: int) -> Iterator[dict[str, Any]]:
    """Yield a dictionary per cursor; of a row that training will skip, its `error`. Raises ConfigError: nothing can be read."""
    from sluice.common.models.assets import read_assets
    from sluice.workers.prompt_source import LeftOut, PromptSource, TooLong

    tokenizer = read_assets(config.model.path, revision=config.model.revision).tokenizer()
    opened = PromptSource(config.dataset, tokenizer, seed=config.seed, code_folder=config.code_folder)
    with closing(opened) as source:
        for cursor in range(number):
            try:
                found = source.prompt_at(cursor)
            except ConfigError as error:
                yield {"cursor": cursor, "error": str(error)}
                continue
            if isinstance(found, LeftOut):
                yield {
                    "cursor": cursor,
                    "error": f"{config.dataset.function} leaves it out: it will be skipped and counted",
                }
                continue
            if isinstance(found, TooLong):
                bound = config.dataset.max_req_tokens
                reason = f"{found.num_tokens} tokens, more than dataset.max_req_tokens = {bound}: it will be skipped and counted"
                yield {"cursor": cursor, "error": reason}
                continue
            ids = found.prompt_ids.tolist()
            shown = {"prompt": found.prompt, "prompt_ids": ids, "target": found.target, "columns": found.columns}
            yield {"cursor": cursor, **shown, "text": tokenizer.decode(ids)}


def _lines(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['cursor']}  error    {_printable(row['error'])}\n"
    ids = row["prompt_ids"]
    return (
        f"{row['cursor']}  text     {_printable(row['text'])}\n"
        f"   tokens   {len(ids)}: {' '.join(map(str, ids))}\n"
        f"   target   {_printable(row['target'])}\n"
        f"   columns  {_printable(row['columns'])}\n"
    )


def _printable(value: Any) -> str:
    """Return a value as JSON in one line, with every character escaped that a terminal could obey."""
    return printable(json.dumps(value, ensure_ascii=False))
