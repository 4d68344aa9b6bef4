"""`sluice ledger`."""

from __future__ import annotations

import json
import sys

import click

from sluice.common.ledger.ledger import read_account
from sluice.scripts.options import Json, RunName, example


@click.command(epilog=example("sluice ledger gsm8k --json"))
@RunName
@Json
def ledger(name: str | None, as_json: bool) -> None:
    """The accounting identity: admitted = trained + dropped + dead + in flight. Exit code 1 when it does not hold."""
    from sluice.dashboard.terminal import ledger_text
    from sluice.scripts.launcher.reading import opened_run

    with opened_run(name) as (client, opened, _):
        accounts = [read_account(client, opened.keys, "train"), read_account(client, opened.keys, "eval")]
    holds = all(account.holds for account in accounts)
    if as_json:
        train, evals = (account.to_dict() for account in accounts)
        click.echo(json.dumps({"run": opened.name, **train, "eval": evals, "holds": holds}))
    else:
        for account in accounts:
            click.echo(f"{account.kind:5}  {ledger_text(account)}")
            click.echo(
                f"       retried {account.retried}, sent again {account.resent}, late results refused {account.refused}"
                + (f", reconciled {account.reconciled}" if account.reconciled else "")
            )
    sys.exit(0 if holds else 1)
