"""`sluice dead`."""

from __future__ import annotations

import json

import click

from sluice.scripts.options import Json, RunName, console, example


@click.command(epilog=example("sluice dead --show t17", "sluice dead --requeue all"))
@RunName
@click.option("--show", "group", metavar="GROUP", help="One dead letter with traceback and completions.")
@click.option("--requeue", multiple=True, metavar="GROUP|all", help="Give it fresh attempts; may be repeated.")
@Json
def dead(name: str | None, group: str | None, requeue: tuple[str, ...], as_json: bool) -> None:
    """Groups that were given up, with reason, worker and traceback; sends them again on request."""
    from sluice.dashboard.dead_letters import read_dead_letters, render_dead
    from sluice.scripts.commands.requeue import requeue_groups
    from sluice.scripts.launcher.existing_run import opened_run

    with opened_run(name) as (client, opened, url):
        if requeue:
            sent = requeue_groups(client, opened, requeue, url=url)
            click.echo(f"sent again: {', '.join(sent) or 'none'}")
            return
        letters = read_dead_letters(client, opened.keys, group=group)
    if as_json:
        click.echo(json.dumps({"dead": letters}))
    elif letters:
        console().print(render_dead(letters))
    else:
        click.echo("no dead letters", err=True)
