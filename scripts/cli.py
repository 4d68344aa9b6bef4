"""The `sluice` command. Bad input is one paragraph and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import redis
from rich.console import Console

from sluice.common.config import QUEUES
from sluice.common.errors import ConfigError, SluiceError
from sluice.common.ledger.ledger import read_counters
from sluice.scripts.commands.control import drain, pause, resume, set_
from sluice.scripts.commands.dashboard import dashboard, trace
from sluice.scripts.commands.metrics import metrics
from sluice.scripts.commands.plan import plan
from sluice.scripts.commands.runs import runs
from sluice.scripts.commands.status import status

RunName = click.argument("name", required=False, metavar="[RUN]")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sluice-rl")
def cli() -> None:
    """Asynchronous RL post-training for language models on Celery and Redis.

    SLUICE_REDIS_URL names the Redis server, SLUICE_RUN the run; commands that read a run take the newest one otherwise.
    """


@cli.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
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
    from sluice.scripts.launcher.launch import run_to_the_end
    from sluice.scripts.launcher.supervisor import RunFailed

    try:
        sys.exit(run_to_the_end(config, list(overrides), name=name, resume=resume))
    except RunFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


@cli.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", help="Name of the run's folder; default: the config's name and the time.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Go on with a run's folder; default: the newest of this config.",
)
def sft(config: str, overrides: tuple[str, ...], name: str | None, resume: str | None) -> None:
    """Supervised training on prompts and completions, in this process, without Redis: a model to begin a run with."""
    from sluice.scripts.commands.sft import run_sft

    run_sft(config, list(overrides), name=name, resume=resume)


@cli.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", help="Name of the run; default: the config's name and the time.")
def create(config: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Store a new run in Redis, for roles that are started one by one (on many machines)."""
    from sluice.scripts.launcher.launch import create as create_run

    made = create_run(config, list(overrides), name=name)
    click.echo(f"export SLUICE_RUN={made.name}")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("queue", type=click.Choice(QUEUES))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def worker(queue: str, options: tuple[str, ...]) -> None:
    """One Celery worker for a queue of SLUICE_RUN: short for `celery -A sluice worker -Q QUEUE [OPTIONS]`."""
    argv = [sys.executable, "-m", "celery", "-A", "sluice", "worker", "-Q", queue, "--loglevel", "INFO", *options]
    os.execv(sys.executable, argv)


@cli.command()
def train() -> None:
    """The trainer of SLUICE_RUN: short for `python -m sluice.trainer`."""
    os.execv(sys.executable, [sys.executable, "-m", "sluice.trainer"])


@cli.command()
@RunName
@_JSON
def ledger(name: str | None, as_json: bool) -> None:
    """The accounting identity: admitted = trained + dropped + dead + in flight. Exit code 1 when it does not hold."""
    from sluice.scripts.launcher.launch import opened_run
    from sluice.scripts.launcher.summary import ledger_text

    with opened_run(name) as (client, opened, _):
        all_counters = [read_counters(client, opened.keys, "train"), read_counters(client, opened.keys, "eval")]
    holds = all(counters.holds for counters in all_counters)
    if as_json:
        train, evals = (counters.to_dict() for counters in all_counters)
        click.echo(json.dumps({"run": opened.name, **train, "eval": evals, "holds": holds}))
    else:
        for counters in all_counters:
            click.echo(f"{counters.kind:5}  {ledger_text(counters)}")
            click.echo(
                f"       retried {counters.retried}, sent again {counters.resent}, late results refused {counters.refused}"
                + (f", reconciled {counters.reconciled}" if counters.reconciled else "")
            )
    sys.exit(0 if holds else 1)


@cli.command()
@RunName
@click.option("-n", "count", default=3, show_default=True, help="Groups to show, newest first.")
@click.option("--step", type=int, help="Only groups of this trainer step.")
@_JSON
def samples(name: str | None, count: int, step: int | None, as_json: bool) -> None:
    """Prompts and completions that were trained on, with rewards and advantages."""
    from sluice.dashboard.samples import read_samples, render_sample
    from sluice.scripts.launcher.launch import opened_run

    with opened_run(name) as (client, opened, _):
        found = read_samples(client, opened.keys, count=count, step=step)
    if as_json:
        click.echo(json.dumps({"samples": found}))
        return
    terminal = console()
    for sample in found:
        terminal.print(render_sample(sample))
    if not found:
        click.echo("no samples yet", err=True)


@cli.command()
@RunName
@click.option("--show", "group", metavar="GROUP", help="One dead letter with traceback and completions.")
@click.option("--requeue", multiple=True, metavar="GROUP|all", help="Give it fresh attempts; may be repeated.")
@_JSON
def dead(name: str | None, group: str | None, requeue: tuple[str, ...], as_json: bool) -> None:
    """Groups that were given up, with reason, worker and traceback; sends them again on request."""
    from sluice.dashboard.dead_letters import read_dead, render_dead
    from sluice.scripts.commands.requeue import requeue_groups
    from sluice.scripts.launcher.launch import opened_run

    with opened_run(name) as (client, opened, url):
        if requeue:
            sent = requeue_groups(client, opened, requeue, url=url)
            click.echo(f"sent again: {', '.join(sent) or 'none'}")
            return
        letters = read_dead(client, opened.keys, group=group)
    if as_json:
        click.echo(json.dumps({"dead": letters}))
    elif letters:
        console().print(render_dead(letters))
    else:
        click.echo("no dead letters", err=True)


@cli.command("eval")
@RunName
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds to wait for the result.")
@click.option("--list", "only_list", is_flag=True, help="Evaluate nothing: all results so far, by version.")
@_JSON
def evaluate(name: str | None, timeout_s: float, only_list: bool, as_json: bool) -> None:
    """Evaluate the newest policy of a running run on its held-out sets, beside training."""
    from sluice.scripts.commands.evaluate import describe, evaluate_latest, list_evaluations
    from sluice.scripts.launcher.launch import opened_run

    with opened_run(name) as (client, opened, url):
        if not only_list:
            results = evaluate_latest(client, opened, url=url, timeout_s=timeout_s)
        else:
            results = list_evaluations(client, opened)
    if as_json:
        click.echo(json.dumps({"evaluations": results}))
    for result in () if as_json else results:
        click.echo(describe(result))


@cli.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Checkpoint to export; default: the newest.")
@click.option("--best", is_flag=True, help="The checkpoint that did best by checkpoint.keep_best.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--adapter", is_flag=True, help="Of a run with trainer.lora: the adapter alone, as a folder of peft.")
def export(run_folder: Path, target: Path, step: int | None, best: bool, dtype: str, adapter: bool) -> None:
    """A checkpoint as a Hugging Face model folder that `transformers` loads; a LoRA adapter is merged into it."""
    from sluice.trainer.best import best_step
    from sluice.trainer.export import export_checkpoint

    if best and step is not None:
        raise ConfigError("--best and --step name two checkpoints: give one of them")
    step = best_step(run_folder / "checkpoints") if best else step
    exported = export_checkpoint(run_folder, target, step=step, dtype=dtype, adapter=adapter)
    click.echo(f"step {exported} of {run_folder.name} is in {target}")


@cli.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--step", type=int, help="Only this step, from the nearest checkpoint under it; default: all that can be."
)
@_JSON
def replay(run_folder: Path, step: int | None, as_json: bool) -> None:
    """Compute recorded steps again from the groups that `audit` kept. Exit code 1 when a loss differs by over 1e-6."""
    from sluice.scripts.commands.replay import print_replay

    sys.exit(0 if print_replay(run_folder, step=step, as_json=as_json) else 1)


@cli.command()
@click.argument("config", required=False, type=click.Path())
def doctor(config: str | None) -> None:
    """Check this machine, Redis and (if given) a config; says what to do about each finding. Exit code 1 on a problem."""
    from sluice.scripts.commands.doctor import examine

    findings = examine(config)
    for finding in findings:
        click.echo(f"{finding.level:8} {finding.text}")
    sys.exit(1 if any(finding.level == "problem" for finding in findings) else 0)


for _command in (dashboard, drain, metrics, pause, plan, resume, runs, set_, status, trace):
    cli.add_command(_command)


def console() -> Console:
    """As wide as the terminal; elsewhere wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def main(argv: list[str] | None = None) -> Any:
    """Entry point: Sluice's own errors become one paragraph and exit code 2."""
    try:
        return cli.main(args=argv, prog_name="sluice")
    except SluiceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        click.echo(f"error: Redis went away: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
