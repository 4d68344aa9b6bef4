"""`sluice trace`."""

from __future__ import annotations

import json

import click

from sluice.dashboard.trace import read_trace, render_trace
from sluice.scripts.launcher.existing_run import opened_run
from sluice.scripts.options import Json, RunName, console, example


@click.command(epilog=example("sluice trace t17"))
@click.argument("group")
@RunName
@Json
def trace(group: str, name: str | None, as_json: bool) -> None:
    """Show the life of one group: its stages with times, workers and attempts."""
    with opened_run(name) as (client, opened, _):
        found = read_trace(client, opened.keys, group)
    if as_json:
        click.echo(json.dumps(found))
    else:
        console().print(render_trace(found))
