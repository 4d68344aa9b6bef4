"""`sluice drain`."""

from __future__ import annotations

import click

from sluice.scripts.control import Who, give_order
from sluice.scripts.options import RunName, example


@click.command(epilog=example("sluice drain gsm8k"))
@RunName
@Who
def drain(name: str | None, who: str | None) -> None:
    """End a run in good order: train what is in flight as far as whole batches go, checkpoint, exit 0. --resume goes on."""
    from sluice.common.operations import control

    give_order(name, who, control.drain, "is draining", "was draining already")
