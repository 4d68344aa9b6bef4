"""`sluice run` and `create`: a new run, with all its roles on this machine or with none; `worker` and `train`: one role of it."""

from __future__ import annotations

import os
import sys

import click

from sluice.common.monitoring.printable import printable
from sluice.common.parent import ended_by_ctrl_c
from sluice.common.pipeline import QUEUES
from sluice.scripts.launcher.forked import imports_without_threads
from sluice.scripts.launcher.roles import PYTHON, trainer_command
from sluice.scripts.options import ConfigFile, Overrides, Resume, example

Name = click.option("--name", help="Name of the run; default: the config's name and the time.")
QUICKSTART = "sluice run config/quickstart.yaml"


@click.command(epilog=example(f"{QUICKSTART} trainer.num_steps=20", f"{QUICKSTART} --resume"))
@ConfigFile
@Overrides
@Name
@Resume
def run(config: str, overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Run all on this machine: Redis if none is given, one worker per queue and replica, the trainer, live progress."""
    click.echo("loading torch, transformers and Celery, once for all roles", err=True)
    with ended_by_ctrl_c():  # until something has started, which `run_to_the_end` then ends in order
        with imports_without_threads():  # this process forks
            from sluice.scripts.launcher.launch import run_to_the_end
            from sluice.scripts.launcher.supervisor import RunFailed

        try:
            sys.exit(run_to_the_end(config, list(overrides), name=name, resume=resume))
        except RunFailed as error:
            click.echo(f"error: {printable(str(error))}", err=True)
            sys.exit(error.exit_code)


@click.command(
    epilog=example("sluice create config/gsm8k_qwen3_1.7b.yaml --name gsm8k policy_store.path=/shared/policies")
)
@ConfigFile
@Overrides
@Name
def create(config: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Store a new run in Redis, for roles that are started one by one (on many machines)."""
    from sluice.scripts.launcher.launch import create as create_run

    made = create_run(config, list(overrides), name=name)
    click.echo(f"export SLUICE_RUN={made.name}")


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
