"""`sluice worker`."""

from __future__ import annotations

import os
import sys

import click

from sluice.common.pipeline import QUEUES
from sluice.scripts.launcher.roles import PYTHON
from sluice.scripts.options import example


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=example("SLUICE_RUN=gsm8k sluice worker rollout --concurrency 8"),
)
@click.argument("queue", type=click.Choice(QUEUES))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def worker(queue: str, options: tuple[str, ...]) -> None:
    """One Celery worker for a queue of SLUICE_RUN: short for `celery -A sluice worker -Q QUEUE [OPTIONS]`."""
    os.execv(sys.executable, [*PYTHON, "-m", "sluice.workers", "-Q", queue, "--loglevel", "INFO", *options])
