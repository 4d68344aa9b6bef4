"""What several commands have in common: arguments, options and the terminal."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from sluice.common.paths import expanded


class UserPath(click.Path):
    """A path of which `~` is replaced also where the shell does not do it: in `--option=~/file`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(str(expanded(value)), param, ctx)


RunName = click.argument("name", required=False, metavar="[RUN]")
Json = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
Overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
ConfigFile = click.argument("config", type=UserPath())
Resume = click.option(
    "--resume", is_flag=False, flag_value="", metavar="[RUN]", help="Resume a run; default: the newest of this config."
)


def example(*lines: str) -> str:
    """Make the end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def console() -> Console:
    """Make a console as wide as the terminal; elsewhere wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
