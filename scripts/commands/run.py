"""`sluice run`, `quickstart` and `create`: a new run, with all its roles on this machine or with none; `worker` and `train`: one
role of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from sluice.common.config.file import find_config, shipped_configs
from sluice.common.errors import ConfigError
from sluice.common.monitoring.printable import printable
from sluice.common.parent import ended_by_ctrl_c
from sluice.common.pipeline import QUEUES
from sluice.scripts.launcher.forked import imports_without_threads
from sluice.scripts.launcher.roles import PYTHON, trainer_command
from sluice.scripts.options import ConfigFile, Overrides, Resume, UserPath, example

Name = click.option("--name", help="Name of the run; default: the config's name and the time.")
TINY = Path("runs/tiny")
"""Where config/quickstart.yaml has its model and data."""


@click.command(
    epilog=example(
        "sluice run run.yaml",
        "sluice run quickstart trainer.num_steps=20",
        "sluice run quickstart --resume",
        "sluice run --model Qwen/Qwen3-0.6B --data rows.jsonl --reward rewards.py:score --reward math",
    )
)
@click.argument("config", required=False, type=UserPath())
@Overrides
@click.option("--model", metavar="MODEL", help="Short for model.path=MODEL: a hub id or a folder.")
@click.option("--data", metavar="DATA", help="Short for dataset.path=DATA: a file, a folder or a hub id.")
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="REWARD",
    help="rewards.py:function, or math, thinking, code; repeatable.",
)
@Name
@Resume
def run(
    config: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    data: str | None,
    rewards: tuple[str, ...],
    name: str | None,
    resume: str | None,
) -> None:
    """Run all on this machine: Redis if none is given, one worker per queue and replica, the trainer, live progress.

    CONFIG is a file, or the name of a shipped config; it may be left out where --model, --data and --reward say what to do.
    """
    if config is not None and "=" in config and not find_config(config).is_file():
        overrides, config = (config, *overrides), None
    flags = [f"{key}={value}" for key, value in (("model.path", model), ("dataset.path", data)) if value]
    flags += [f"reward.functions={json.dumps(rewards)}"] if rewards else []
    if config is None and resume is None:
        _check_flags({"--model": model, "--data": data, "--reward": rewards}, overrides)
    _drive(config, [*flags, *overrides], name=name, resume=resume)


def _check_flags(flags: dict[str, object], overrides: tuple[str, ...]) -> None:
    """Refuse a run without a file that lacks what has no default; a key=value says it as well as a flag."""
    sections = {override.partition(".")[0].partition("=")[0] for override in overrides}
    named = {"--model": "model", "--data": "dataset", "--reward": "reward"}
    absent = [flag for flag, value in flags.items() if not value and named[flag] not in sections]
    if len(absent) == len(flags):
        shipped = ", ".join(shipped_configs())
        raise ConfigError(
            f"name what to run: a config file (`sluice init` writes one), one that is shipped ({shipped}), or --model, --data "
            "and --reward"
        )
    if absent:
        raise ConfigError(f"a run without a config file needs --model, --data and --reward: add {' and '.join(absent)}")


@click.command(
    epilog=example("sluice quickstart", "sluice quickstart trainer.num_steps=20", "sluice quickstart --resume")
)
@Overrides
@Name
@Resume
def quickstart(overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Make a tiny model that adds badly, and its task, in runs/tiny (once); then run the shipped config `quickstart`."""
    _drive("quickstart", list(overrides), name=name, resume=resume, prepare=partial(prepare_tiny, TINY))


def prepare_tiny(folder: Path) -> None:
    """Make the tiny model and its data, where they are not yet there."""
    from sluice.scripts.prepare_tiny import prepare  # torch loads here

    prepare(folder, say=lambda text: click.echo(text, err=True))


def _drive(
    config: str | None,
    overrides: list[str],
    *,
    name: str | None,
    resume: str | None,
    prepare: Callable[[], None] | None = None,
) -> NoReturn:
    click.echo("loading torch, transformers and Celery, once for all roles", err=True)
    with ended_by_ctrl_c():  # until something has started, which `run_to_the_end` then ends in order
        with imports_without_threads():  # this process forks
            from sluice.scripts.launcher.launch import run_to_the_end
            from sluice.scripts.launcher.supervisor import RunFailed

        try:
            sys.exit(run_to_the_end(config, overrides, name=name, resume=resume, prepare=prepare))
        except RunFailed as error:
            click.echo(f"error: {printable(str(error))}", err=True)
            sys.exit(error.exit_code)


@click.command(epilog=example("sluice create gsm8k_qwen3_1.7b --name gsm8k policy_store.path=/shared/policies"))
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
