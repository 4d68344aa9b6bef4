"""`sluice pause`."""

from __future__ import annotations

import click

from sluice.scripts.control import Who, give_order
from sluice.scripts.options import RunName, example


@click.command(epilog=example("sluice pause gsm8k"))
@RunName
@Who
def pause(name: str | None, who: str | None) -> None:
    """Hold a run: nothing is admitted and no step begins; what is in flight is finished and kept. Outlives restarts."""
    from sluice.common.operations import control

    give_order(name, who, control.pause, "paused; `sluice resume` goes on", "was paused already")
