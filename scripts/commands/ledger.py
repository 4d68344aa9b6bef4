"""`sluice ledger`."""

from __future__ import annotations

import json
import sys

import click

from sluice.common.ledger.ledger import read_counters
from sluice.dashboard.terminal import ledger_text
from sluice.scripts.launcher.existing_run import opened_run
from sluice.scripts.options import Json, RunName, example


@click.command(epilog=example("sluice ledger gsm8k --json"))
@RunName
@Json
def ledger(name: str | None, as_json: bool) -> None:
    """Check the accounting identity: admitted = trained + dropped + dead + in_flight. Exit code 1 when it does not hold."""
    with opened_run(name) as (client, opened, _):
        all_counters = [read_counters(client, opened.keys, "train"), read_counters(client, opened.keys, "eval")]
    holds = all(counters.holds for counters in all_counters)
    if as_json:
        train, evals = (counters.to_dict() for counters in all_counters)
        click.echo(json.dumps({"run": opened.name, **train, "eval": evals, "holds": holds}))
    else:
        for counters in all_counters:
            click.echo(f"{counters.kind:5}  {ledger_text(counters)}")
            reconciled = f", reconciled {counters.reconciled}" if counters.reconciled else ""
            refused = f"late results refused {counters.refused}{reconciled}"
            click.echo(f"       retried {counters.retried}, sent again {counters.resent}, {refused}")
    sys.exit(0 if holds else 1)
