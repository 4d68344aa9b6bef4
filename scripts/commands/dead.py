"""`sluice dead`: groups that were dead-lettered, shown or put back into the ledger and the queues."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click
import redis

from sluice.common.connections.broker import make_app, send_stage
from sluice.common.ledger.ledger import Ledger
from sluice.common.run import Run
from sluice.dashboard.dead_letters import read_dead_letters, render_dead
from sluice.scripts.launcher.run_folder import opened_run
from sluice.scripts.options import Json, RunName, console, example


@click.command(epilog=example("sluice dead --show t17", "sluice dead --requeue all"))
@RunName
@click.option("--show", "group", metavar="GROUP", help="One dead letter with traceback and completions.")
@click.option("--requeue", multiple=True, metavar="GROUP|all", help="Give it fresh attempts; may be repeated.")
@Json
def dead(name: str | None, group: str | None, requeue: tuple[str, ...], as_json: bool) -> None:
    """Show dead-lettered groups with reason, worker and traceback; requeue them on request."""
    with opened_run(name) as (client, opened, url):
        if requeue:
            sent = _requeue(client, opened, requeue, url=url)
            click.echo(f"sent again: {', '.join(sent) or 'none'}")
            return
        letters = read_dead_letters(client, opened.keys, group=group)
    if as_json:
        click.echo(json.dumps({"dead": letters}))
    elif letters:
        console().print(render_dead(letters))
    else:
        click.echo("no dead letters", err=True)


def _requeue(client: redis.Redis, run: Run, groups: Sequence[str], *, url: str) -> list[str]:
    """Requeue the named groups, or all; return those sent. Raises ConfigError for one that is not dead."""
    letters = [read_dead_letters(client, run.keys, group=None if name == "all" else name) for name in groups]
    chosen = [letter["group"] for found in letters for letter in found]
    ledger = Ledger(client, run.keys, run.config, worker="requeue")
    app = make_app(run.name, url=os.environ.get("SLUICE_BROKER_URL") or url)
    for group in chosen:
        for stage in ledger.requeue(group):
            send_stage(app, group, stage)
    return chosen
