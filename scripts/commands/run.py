"""`sluice run` and `sluice create`: a new run, with all its roles on this machine or with none."""

from __future__ import annotations

import sys

import click

from sluice.scripts.launcher.forked import imports_without_threads
from sluice.scripts.options import ConfigFile, Overrides, Resume, example

Name = click.option("--name", help="Name of the run; default: the config's name and the time.")


@click.command(
    epilog=example(
        "sluice run config/quickstart.yaml trainer.num_steps=20", "sluice run config/quickstart.yaml --resume"
    )
)
@ConfigFile
@Overrides
@Name
@Resume
def run(config: str, overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Run all on this machine: Redis if none is given, one worker per queue and replica, the trainer, live progress."""
    with imports_without_threads():  # this process forks
        from sluice.scripts.launcher.launch import run_to_the_end
        from sluice.scripts.launcher.supervisor import RunFailed

    try:
        sys.exit(run_to_the_end(config, list(overrides), name=name, resume=resume))
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


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
