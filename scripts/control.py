"""An order to a run, given by a command: `sluice pause`, `resume`, `drain` and `set`."""

from __future__ import annotations

from collections.abc import Callable

import click

Who = click.option("--who", envvar="SLUICE_WHO", help="Who orders it, for the trail; default: user@host.")


def give_order(name: str | None, who: str | None, order: Callable[..., bool], done: str, was_so: str) -> None:
    """Give it, and say what came of it."""
    from sluice.common.operations.control import default_who
    from sluice.scripts.launcher.existing_run import opened_run

    with opened_run(name) as (client, opened, _):
        changed = order(client, opened, who=who or default_who())
    click.echo(f"{opened.name} {done if changed else was_so}")
