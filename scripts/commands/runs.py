"""`sluice runs`: the runs of one Redis (else the run folders here), listed, compared, archived, deleted.

An archive is a tar of JSON: `run.json` (record, settings, ledger, evaluations), `config.yaml` as the run was created, and one
JSONL file per stream. Weights are not in it: they are in the run folder's checkpoints. A deletion touches no other run's keys,
and also removes the run's published policies on this machine; common/operations/storage.py has its order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import click
import redis

from sluice.common.config import Config
from sluice.common.config.file import parse_config, read_run_config
from sluice.common.connections.client import connect
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError, ConnectionFailed
from sluice.common.keys import Keys
from sluice.common.ledger.evaluations import read_all
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.diagnosis import broker_client
from sluice.common.monitoring.heartbeats import is_silent, read_heartbeats
from sluice.common.monitoring.metric_stream import ArchivedStream, last_metrics, read_archive
from sluice.common.operations.control import read_control_state
from sluice.common.operations.storage import begin_removal, end_removal, has_keys, memory_of_runs, remove_keys
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run, RunRecord, list_runs
from sluice.common.serialization import decode
from sluice.dashboard.dead_letters import read_dead_letters
from sluice.scripts.commands.compare import compare, finite
from sluice.scripts.launcher.redis_server import DataInUse, running_url, take_lock
from sluice.scripts.launcher.run_folder import existing_folder, opened_run
from sluice.scripts.options import Json, UserPath, echo_json, example


@click.group(invoke_without_command=True, epilog=example("sluice runs", "sluice runs compare first second"))
@Json
@click.pass_context
def runs(context: click.Context, as_json: bool) -> None:
    """List, compare, archive or delete the runs on the Redis of SLUICE_REDIS_URL, else the run folders here."""
    if context.invoked_subcommand is None:
        _list(as_json)


@runs.command("list", epilog=example("sluice runs list --json"))
@Json
def list_(as_json: bool) -> None:
    """List name, status, step, reward, live processes, memory held and creation; oldest first."""
    _list(as_json)


runs.add_command(compare)


@runs.command(epilog=example("sluice runs archive first first.tar"))
@click.argument("name", metavar="RUN")
@click.argument("file", required=False, type=UserPath(path_type=Path), metavar="[FILE]")
def archive(name: str, file: Path | None) -> None:
    """Write metrics, samples, evaluations, ledger, events and change log of a run as a tar of JSON; default: RUN.tar."""
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
    if not yes:
        what = "its keys in Redis and its run folder with all checkpoints" if with_folder else "its keys in Redis"
        click.confirm(f"Delete run {name}: {what}?", abort=True)
    if secret("SLUICE_REDIS_URL"):
        removed = delete_run(connect(), name, force=force, with_folder=with_folder)
        click.echo(f"{name} is deleted: {removed} keys")
        return
    folder = existing_folder(Keys(name).run)  # its Redis' data are all that there is of it
    try:
        lock = take_lock(folder / "redis")
    except DataInUse:
        raise ConfigError(
            f"run {name} is alive: it has a Redis; end it with Ctrl-C or `sluice drain {name}` first"
        ) from None
    remove_policies(read_run_config(folder), name)
    shutil.rmtree(checked_folder(folder, name) if with_folder else folder / "redis")
    os.close(lock)
    click.echo(f"{name} is deleted")


def _list(as_json: bool) -> None:
    on_redis = secret("SLUICE_REDIS_URL") is not None
    found = list(read_runs(connect()) if on_redis else _folders())
    if as_json:
        echo_json({"runs": found})
        return
    for line in found:
        click.echo(_line(line))
    if not found:
        click.echo("no runs on this Redis" if on_redis else "no runs here")


def read_runs(client: redis.Redis) -> Iterator[dict[str, Any]]:
    """Yield one dictionary per run, oldest first; also of keys whose run has no entry (an interrupted creation or deletion)."""
    created, memory = list_runs(client), memory_of_runs(client)
    for name in sorted({*created, *memory}, key=lambda name: (created.get(name, math.inf), name)):
        keys = Keys(name)
        metrics, status = last_metrics(client, keys), RunRecord(client, keys).status
        yield {
            "run": name,
            "status": status or "incomplete",
            "step": int(metrics.get("step", 0)),
            "reward": metrics.get("reward/mean"),
            "live": len(live_processes(client, keys)),
            "memory_bytes": memory[name],
            "created_at": created.get(name),
        }


def _folders() -> Iterator[dict[str, Any]]:
    """Return the runs with a Redis of their own, from their folders."""
    for config in sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime):
        folder = config.parent
        if (folder / "redis").is_dir() and running_url(folder / "redis") is not None:
            try:
                with opened_run(folder.name) as (client, _, _):
                    yield from ({**run, "status": "running"} for run in read_runs(client) if run["run"] == folder.name)
            except ConnectionFailed as error:
                click.echo(f"{folder.name}: {error}", err=True)
            continue
        summary = folder / "summary.json"
        ended = json.loads(summary.read_text()) if summary.is_file() else {}
        yield {
            "run": folder.name,
            "status": "ended",
            "step": ended.get("steps", 0),
            "reward": ended.get("reward_last"),
            "live": 0,
            "memory_bytes": 0,
            "created_at": config.stat().st_mtime,
        }


def _line(run: dict[str, Any]) -> str:
    reward = "" if run["reward"] is None else f"  reward {run['reward']:.3f}"
    at = run["created_at"]
    created = "" if at is None else f"  created {datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
    held = f"{run['live']} processes  {run['memory_bytes'] / 2**20:.1f} MiB"
    return f"{run['run']}  {run['status']}  step {run['step']}{reward}  {held}{created}"


def archive_run(client: redis.Redis, run: Run, file: Path) -> list[str]:
    """Write the archive, completely or not at all; return the names in it. Raises ConfigError where the file exists."""
    if file.exists():
        raise ConfigError(f"{file} exists: give another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".archive-") as temporary:
        folder = Path(temporary) / run.name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(_record(client, run), indent=2, default=_plain) + "\n")
        (folder / "config.yaml").write_text(run.config.to_yaml())
        for name in get_args(ArchivedStream):
            _write_lines(folder / f"{name}.jsonl", _entries(client, run.keys, name))
        _write_lines(folder / "dead.jsonl", read_dead_letters(client, run.keys))
        unfinished = Path(temporary) / "archive.tar"
        with tarfile.open(unfinished, "w") as tar:
            tar.add(folder, arcname=run.name)
        names = sorted(path.name for path in folder.iterdir())
        unfinished.rename(file)
    return names


def _record(client: redis.Redis, run: Run) -> dict[str, Any]:
    record = RunRecord(client, run.keys)
    control_state = read_control_state(client, run.keys)
    return {
        "run": run.name,
        "status": record.status or "?",
        "created_at": float(record.created_at or 0),
        "folder": run.folder,
        "settings": {key: json.loads(value) for key, value in control_state.settings.items()},
        "paused": control_state.paused,
        "draining": control_state.draining,
        "policy": read_pointer(client, run.keys),
        "ledger": {kind: read_counters(client, run.keys, kind).to_dict() for kind in ("train", "eval")},
        "evaluations": read_all(client, run),
    }


def _entries(client: redis.Redis, keys: Keys, stream: ArchivedStream) -> Iterator[dict[str, Any]]:
    """Yield every entry of a stream as plain data."""
    for entry, fields in read_archive(client, keys, stream):
        if stream == "samples":
            yield decode(fields[b"sample"])
        else:
            texts = {name.decode(): value.decode() for name, value in fields.items()}
            is_metrics = stream == "metrics"
            yield finite({k: float(v) for k, v in texts.items()}) if is_metrics else {"entry": entry, **texts}


def _write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(entry, default=_plain) + "\n" for entry in entries)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def live_processes(client: redis.Redis, keys: Keys) -> list[str]:
    """Return the names of the run's processes that send heartbeats."""
    return [name for name, stats in read_heartbeats(client, keys).items() if not is_silent(stats)]


def delete_run(client: redis.Redis, name: str, *, force: bool = False, with_folder: bool = False) -> int:
    """Remove all keys of a run, and its published policies here; return the number of keys. Raises ConfigError.

    force: also while its processes live, which then write some keys again. with_folder: the run folder too.
    """
    keys = Keys(name)
    record = RunRecord(client, keys)
    config, folder = record.config, record.folder
    if name not in (known := list_runs(client)) and not has_keys(client, keys):
        raise ConfigError(f"there is no run {name!r} on this Redis (runs: {', '.join(known) or 'none'})")
    if (live := live_processes(client, keys)) and not force:
        raise ConfigError(f"run {name} is alive ({', '.join(live)}): stop its processes first, or give --force")
    doomed = checked_folder(Path(folder), name) if with_folder and folder else None
    begin_removal(client, keys)
    removed = remove_keys(client, keys)
    if (broker := broker_client(client)) is not client:
        removed += remove_keys(broker, keys)
    if config:
        remove_policies(parse_config(config, source=f"stored config of run {name}"), name)
    if doomed is not None:
        shutil.rmtree(doomed)
    return removed + end_removal(client, keys)


def checked_folder(folder: Path, name: str) -> Path:
    """Return a run folder that may be removed. Raises ConfigError for any other."""
    if folder.name != name or not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not the run folder of {name} on this machine: remove it by hand; nothing was done"
        )
    return folder


def remove_policies(config: Config, name: str) -> None:
    """Remove the published policies of a run from a folder of this machine."""
    from sluice.common.policies.transports import store_folder

    if config.policy_store.transport == "directory":
        shutil.rmtree(store_folder(config.policy_store, name), ignore_errors=True)
