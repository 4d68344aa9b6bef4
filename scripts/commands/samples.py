"""`sluice samples`."""

from __future__ import annotations

import json

import click

from sluice.dashboard.samples import read_samples, render_sample
from sluice.scripts.launcher.existing_run import opened_run
from sluice.scripts.options import Json, RunName, console, example


@click.command(epilog=example("sluice samples -n 5 --step 100"))
@RunName
@click.option("-n", "count", default=3, show_default=True, help="Groups to show, newest first.")
@click.option("--step", type=int, help="Only groups of this trainer step.")
@Json
def samples(name: str | None, count: int, step: int | None, as_json: bool) -> None:
    """Show prompts and completions that were trained on, with rewards and advantages."""
    with opened_run(name) as (client, opened, _):
        found = read_samples(client, opened.keys, count=count, step=step)
    if as_json:
        click.echo(json.dumps({"samples": found}))
        return
    terminal = console()
    for sample in found:
        terminal.print(render_sample(sample))
    if not found:
        click.echo("no samples yet", err=True)
