"""`sluice resume`."""

from __future__ import annotations

import click

from sluice.scripts.control import Who, give_order
from sluice.scripts.options import RunName, example


@click.command(epilog=example("sluice resume gsm8k"))
@RunName
@Who
def resume(name: str | None, who: str | None) -> None:
    """Undo `sluice pause` and `sluice drain`."""
    from sluice.common.operations import control

    give_order(name, who, control.resume, "goes on", "was neither paused nor draining")
