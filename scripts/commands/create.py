"""`sluice create`."""

from __future__ import annotations

import click

from sluice.scripts.options import ConfigFile, Overrides, example


@click.command(
    epilog=example("sluice create config/gsm8k_qwen3_1.7b.yaml --name gsm8k policy_store.path=/shared/policies")
)
@ConfigFile
@Overrides
@click.option("--name", help="Name of the run; default: the config's name and the time.")
def create(config: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Store a new run in Redis, for roles that are started one by one (on many machines)."""
    from sluice.scripts.launcher.launch import create as create_run

    made = create_run(config, list(overrides), name=name)
    click.echo(f"export SLUICE_RUN={made.name}")
