"""One run as a file that outlives it, and a run removed from Redis without a touch of any other's keys.

An archive is a tar of JSON: `run.json` (record, settings, ledger, evaluations), `config.yaml` as the run was created, and one
JSONL file per stream. Weights are not in it: they are in the run folder's checkpoints.

A deletion also removes the run's published policies on this machine; common/operations/storage.py has its order.
"""

from __future__ import annotations

import json
import math
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import redis

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.diagnosis import broker_client
from sluice.common.monitoring.heartbeats import is_silent, read_heartbeats
from sluice.common.monitoring.metric_stream import ArchivedStream, read_archive
from sluice.common.operations.control import read_control_state
from sluice.common.operations.storage import begin_removal, end_removal, has_keys, remove_keys
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run, RunRecord, list_runs
from sluice.common.serialization import decode
from sluice.dashboard.dead_letters import read_dead_letters
from sluice.dashboard.evaluations import list_evaluations


def archive_run(client: redis.Redis, run: Run, file: Path) -> list[str]:
    """Write the archive, whole or not at all; names of what is in it. Raises ConfigError where the file is there already."""
    if file.exists():
        raise ConfigError(f"{file} is there already: give another file")
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
        "evaluations": list_evaluations(client, run),
    }


def _entries(client: redis.Redis, keys: Keys, stream: ArchivedStream) -> Iterator[dict[str, Any]]:
    """Every entry of a stream as plain data."""
    for entry, fields in read_archive(client, keys, stream):
        if stream == "samples":
            yield decode(fields[b"sample"])
        else:
            texts = {name.decode(): value.decode() for name, value in fields.items()}
            yield _finite(texts) if stream == "metrics" else {"entry": entry, **texts}


def _finite(texts: Mapping[str, str]) -> dict[str, float]:
    """As in metrics.jsonl: JSON has no nan."""
    values = {name: float(text) for name, text in texts.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(entry, default=_plain) + "\n" for entry in entries)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def live_processes(client: redis.Redis, keys: Keys) -> list[str]:
    """Names of the run's processes that beat."""
    return [name for name, stats in read_heartbeats(client, keys).items() if not is_silent(stats)]


def delete_run(client: redis.Redis, name: str, *, force: bool = False, with_folder: bool = False) -> int:
    """Remove all that a run keeps in Redis, and its published policies here; how many keys. Raises ConfigError.

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
    """A run folder that may be removed whole. Raises ConfigError for any other."""
    if folder.name != name or not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not the run folder of {name} on this machine: remove it by hand; nothing was done"
        )
    return folder


def remove_policies(config: Config, name: str) -> None:
    """The published policies of a run that lie in a folder of this machine."""
    from sluice.common.policies.transports import store_folder

    if config.policy_store.transport == "directory":
        shutil.rmtree(store_folder(config.policy_store, name), ignore_errors=True)
