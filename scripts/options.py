"""What several commands have in common: arguments, options and the terminal."""

from __future__ import annotations

import os
from typing import Any, TextIO

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


class Unread:
    """A text stream that nobody need read: when its reader has gone (`2>&1 | head`) or the disk is full, what is said is lost,
    and the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self._give_up(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up(0)

    def _give_up(self, size: int) -> int:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        return size

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
