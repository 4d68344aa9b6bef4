"""`sluice worker` and `sluice train`: one role of SLUICE_RUN in place of this process."""

from __future__ import annotations

import os
import sys

import click

from sluice.common.pipeline import QUEUES
from sluice.scripts.launcher.roles import PYTHON, trainer_command
from sluice.scripts.options import example


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=example("SLUICE_RUN=gsm8k sluice worker rollout --concurrency 8"),
)
@click.argument("queue", type=click.Choice(QUEUES))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def worker(queue: str, options: tuple[str, ...]) -> None:
    """Run a Celery worker for a queue of SLUICE_RUN: short for `celery -A sluice worker -Q QUEUE [OPTIONS]`."""
    os.execv(sys.executable, [*PYTHON, "-m", "sluice.workers", "-Q", queue, "--loglevel", "INFO", *options])


@click.command(epilog=example("SLUICE_RUN=gsm8k sluice train", "SLUICE_RUN=gsm8k sluice train --ranks 4"))
@click.option("--ranks", type=click.IntRange(min=1), default=1, help="Processes that train together, one per GPU.")
def train(ranks: int) -> None:
    """Run the trainer of SLUICE_RUN; with one rank the same as `python -m sluice.trainer`."""
    os.execv(sys.executable, trainer_command(ranks))
