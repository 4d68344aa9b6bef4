"""`sluice run`."""

from __future__ import annotations

import sys

import click

from sluice.scripts.launcher.forked import imports_without_threads
from sluice.scripts.options import ConfigFile, Overrides, example


@click.command(
    epilog=example(
        "sluice run config/quickstart.yaml trainer.num_steps=20", "sluice run config/quickstart.yaml --resume"
    )
)
@ConfigFile
@Overrides
@click.option("--name", help="Name of the run; default: the config's name and the time.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Go on with a run; default: the newest of this config.",
)
def run(config: str, overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Everything on this machine: Redis if none is given, one worker per queue and replica, the trainer, live progress."""
    with imports_without_threads():  # this process forks
        from sluice.scripts.launcher.launch import run_to_the_end
        from sluice.scripts.launcher.supervisor import RunFailed

    try:
        sys.exit(run_to_the_end(config, list(overrides), name=name, resume=resume))
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
