"""`sluice runs`: the runs of one Redis (else the run folders here), listed, compared, archived, deleted."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import redis

from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.operations.storage import memory_of_runs
from sluice.common.run import RunRecord, list_runs
from sluice.scripts.options import Json, example

_SHOWN = (
    "step",
    "reward/mean",
    "loss/policy",
    "entropy",
    "grad_norm",
    "staleness/mean",
    "completions/mean_length",
    "throughput/trained_tokens_per_s",
)
"""Metrics that `compare` prints; --json holds all."""


@click.group(invoke_without_command=True, epilog=example("sluice runs", "sluice runs compare first second"))
@Json
@click.pass_context
def runs(context: click.Context, as_json: bool) -> None:
    """Runs on the Redis of SLUICE_REDIS_URL, else the run folders here; without a subcommand they are listed."""
    if context.invoked_subcommand is None:
        _list(as_json)


@runs.command("list", epilog=example("sluice runs list --json"))
@Json
def list_(as_json: bool) -> None:
    """Name, status, step, reward, live processes, memory held, creation; oldest first."""
    _list(as_json)


@runs.command(epilog=example("sluice runs compare first second"))
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@Json
def compare(names: tuple[str, ...], as_json: bool) -> None:
    """Where their configs differ, their last metrics and their last evaluations, side by side."""
    from sluice.common.monitoring.metric_stream import last_metrics
    from sluice.common.operations.control import effective
    from sluice.dashboard.evaluations import list_evaluations
    from sluice.scripts.launcher.existing_run import opened_run

    columns: dict[str, dict[str, Any]] = {}
    for name in names:
        with opened_run(name) as (client, opened, _):
            scores: dict[str, float] = {}
            for entry in list_evaluations(client, opened):  # oldest version first
                scores |= {f"eval/{entry['dataset']}/{k}": v for k, v in entry.items() if isinstance(v, float)}
            columns[name] = {
                "config": dict(_flat(effective(client, opened).model_dump(mode="json"))),
                "metrics": last_metrics(client, opened.keys),
                "evaluations": scores,
            }
    keys = dict.fromkeys(key for column in columns.values() for key in column["config"])
    differing = [key for key in keys if len({repr(column["config"].get(key)) for column in columns.values()}) > 1]
    if as_json:
        configs = {key: {name: column["config"].get(key) for name, column in columns.items()} for key in differing}
        rest = {
            part: {name: _finite(column[part]) for name, column in columns.items()}
            for part in ("metrics", "evaluations")
        }
        click.echo(json.dumps({"runs": list(names), "config": configs, **rest}))
        return
    _print_columns(columns, differing)


@runs.command(epilog=example("sluice runs archive first first.tar"))
@click.argument("name", metavar="RUN")
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[FILE]")
def archive(name: str, file: Path | None) -> None:
    """Metrics, samples, evaluations, ledger, events and orders of a run as a tar of JSON; default FILE: RUN.tar."""
    from sluice.scripts.commands.archive import archive_run
    from sluice.scripts.launcher.existing_run import opened_run

    with opened_run(name) as (client, opened, _):
        names = archive_run(client, opened, file := file or Path(f"{name}.tar"))
    click.echo(f"{name} is in {file}: {', '.join(names)}")


@runs.command(epilog=example("sluice runs delete first --with-folder"))
@click.argument("name", metavar="RUN")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also while processes of the run live.")
@click.option("--with-folder", is_flag=True, help="Also the run folder: checkpoints, logs, metrics.jsonl.")
def delete(name: str, yes: bool, force: bool, with_folder: bool) -> None:
    """Remove a run from Redis: its keys and queues, and its published policies on this machine. No other run's."""
    from sluice.common.connections.client import connect
    from sluice.scripts.commands.archive import delete_run

    if not yes:
        what = "its keys in Redis and its run folder with all checkpoints" if with_folder else "its keys in Redis"
        click.confirm(f"Delete run {name}: {what}?", abort=True)
    if secret("SLUICE_REDIS_URL"):
        removed = delete_run(connect(), name, force=force, with_folder=with_folder)
        click.echo(f"{name} is deleted: {removed} keys")
    else:
        _delete_folder(name, with_folder=with_folder)
        click.echo(f"{name} is deleted")


def _delete_folder(name: str, *, with_folder: bool) -> None:
    """A run with a Redis of its own: that Redis' data, and its published policies."""
    from sluice.common.config.file import read_run_config
    from sluice.scripts.commands.archive import checked_folder, remove_policies
    from sluice.scripts.launcher.redis_server import running_url
    from sluice.scripts.launcher.run_folder import existing_folder

    folder = existing_folder(Keys(name).run)
    if running_url(folder / "redis"):
        raise ConfigError(f"run {name} is alive: its Redis answers; end it with Ctrl-C or `sluice drain {name}` first")
    remove_policies(read_run_config(folder), name)
    shutil.rmtree(checked_folder(folder, name) if with_folder else folder / "redis")


def _list(as_json: bool) -> None:
    from sluice.common.connections.client import connect

    on_redis = secret("SLUICE_REDIS_URL") is not None
    found = read_runs(connect()) if on_redis else list(_folders())
    if as_json:
        click.echo(json.dumps({"runs": found}))
        return
    for line in found:
        click.echo(_line(line))
    if not found:
        click.echo("no runs on this Redis" if on_redis else "no runs here")


def read_runs(client: redis.Redis) -> list[dict[str, Any]]:
    """One dictionary per run, oldest first; also of keys whose run has no entry (a creation or a deletion was cut off)."""
    from sluice.common.monitoring.metric_stream import last_metrics
    from sluice.scripts.commands.archive import live_processes

    created, memory = list_runs(client), memory_of_runs(client)
    found = []
    for name in sorted({*created, *memory}, key=lambda name: (created.get(name, math.inf), name)):
        keys = Keys(name)
        metrics, status = last_metrics(client, keys), RunRecord(client, keys).status
        found.append(
            {
                "run": name,
                "status": status or "incomplete",
                "step": int(metrics.get("step", 0)),
                "reward": metrics.get("reward/mean"),
                "live": len(live_processes(client, keys)),
                "memory_bytes": memory[name],
                "created_at": created.get(name),
            }
        )
    return found


def _folders() -> Iterator[dict[str, Any]]:
    """Runs with a Redis of their own, from what lies in their folders."""
    from sluice.common.connections.client import connect
    from sluice.scripts.launcher.redis_server import running_url

    for config in sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime):
        folder = config.parent
        if url := running_url(folder / "redis"):
            client = connect(url)
            yield from ({**run, "status": "running"} for run in read_runs(client) if run["run"] == folder.name)
            client.close()
            continue
        summary = folder / "summary.json"
        told = json.loads(summary.read_text()) if summary.is_file() else {}
        yield {
            "run": folder.name,
            "status": "ended",
            "step": told.get("steps", 0),
            "reward": told.get("reward_last"),
            "live": 0,
            "memory_bytes": 0,
            "created_at": config.stat().st_mtime,
        }


def _line(run: dict[str, Any]) -> str:
    reward = "" if run["reward"] is None else f"  reward {run['reward']:.3f}"
    created = (
        "" if run["created_at"] is None else f"  created {datetime.fromtimestamp(run['created_at']):%Y-%m-%d %H:%M:%S}"
    )
    return (
        f"{run['run']}  {run['status']}  step {run['step']}{reward}  {run['live']} processes  "
        f"{run['memory_bytes'] / 2**20:.1f} MiB{created}"
    )


def _print_columns(columns: dict[str, dict[str, Any]], differing: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    scores = dict.fromkeys(key for column in columns.values() for key in column["evaluations"])
    for title, part, rows in (
        ("config, where it differs", "config", differing),
        ("last metrics", "metrics", _SHOWN),
        ("last evaluations", "evaluations", scores),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(row, *(_cell(column[part].get(row)) for column in columns.values()))
        console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; a list is one value."""
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
