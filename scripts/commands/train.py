"""`sluice train`."""

from __future__ import annotations

import os
import sys

import click

from sluice.scripts.launcher.roles import trainer_command
from sluice.scripts.options import example


@click.command(epilog=example("SLUICE_RUN=gsm8k sluice train", "SLUICE_RUN=gsm8k sluice train --ranks 4"))
@click.option(
    "--ranks", "num_ranks", type=click.IntRange(min=1), default=1, help="Processes that train together, one per GPU."
)
def train(num_ranks: int) -> None:
    """The trainer of SLUICE_RUN; with one rank what `python -m sluice.trainer` is."""
    os.execv(sys.executable, trainer_command(num_ranks))
