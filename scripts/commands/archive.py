"""One run as a file that outlives it, and a run removed from Redis without a touch of any other's keys.

An archive is a tar of JSON: `run.json` (record, settings, ledger, evaluations), `config.yaml` as the run was created, and one
JSONL file per stream. Weights are not in it: they are in the run folder's checkpoints.

    delete: status `deleting` (the name stays in use) -> every other key of the run, in batches -> its published policies on
    this machine -> its entry of `sluice:runs` -> its record, last. Interrupted anywhere, it can be done again.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import redis

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import RUNS, Keys
from sluice.common.ledger.ledger import read_counters
from sluice.common.ledger.scripts import Scripts
from sluice.common.monitoring.diagnosis import broker_client
from sluice.common.monitoring.metrics import is_silent, read_heartbeats
from sluice.common.operations.control import read_control_state
from sluice.common.run import Run
from sluice.common.serialization import decode
from sluice.dashboard.dead_letters import read_dead
from sluice.scripts.commands.evaluate import list_evaluations

_PAGE = 1000
"Entries or keys per round trip."


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
        for name in ("metrics", "samples", "controls", "events"):
            _write_lines(folder / f"{name}.jsonl", _entries(client, run.keys, name))
        _write_lines(folder / "dead.jsonl", read_dead(client, run.keys))
        unfinished = Path(temporary) / "archive.tar"
        with tarfile.open(unfinished, "w") as tar:
            tar.add(folder, arcname=run.name)
        names = sorted(path.name for path in folder.iterdir())
        unfinished.rename(file)
    return names


def _record(client: redis.Redis, run: Run) -> dict[str, Any]:
    status, created_at = client.hmget(run.keys("run"), ["status", "created_at"])
    control_state = read_control_state(client, run.keys)
    return {
        "run": run.name,
        "status": (status or b"?").decode(),
        "created_at": float(created_at or 0),
        "folder": run.folder,
        "settings": {key: json.loads(value) for key, value in control_state.settings.items()},
        "paused": control_state.paused,
        "draining": control_state.draining,
        "policy": {name.decode(): value.decode() for name, value in client.hgetall(run.keys("policy")).items()},
        "ledger": {kind: read_counters(client, run.keys, kind).to_dict() for kind in ("train", "eval")},
        "evaluations": list_evaluations(client, run),
    }


def _entries(client: redis.Redis, keys: Keys, stream: str) -> Iterator[dict[str, Any]]:
    """Every entry of a stream as plain data."""
    start = "-"
    while page := client.xrange(keys(stream), min=start, count=_PAGE):
        for entry, fields in page:
            if stream == "samples":
                yield decode(fields[b"sample"])
            else:
                texts = {name.decode(): value.decode() for name, value in fields.items()}
                yield _finite(texts) if stream == "metrics" else {"entry": entry.decode(), **texts}
        start = f"({page[-1][0].decode()}"


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
    config, folder = client.hmget(keys("run"), ["config", "folder"])
    if not client.hexists(RUNS, name) and next(scan_keys(client, keys.root), None) is None:
        known = ", ".join(sorted(run.decode() for run in client.hkeys(RUNS))) or "none"
        raise ConfigError(f"there is no run {name!r} on this Redis (runs: {known})")
    if (live := live_processes(client, keys)) and not force:
        raise ConfigError(f"run {name} is alive ({', '.join(live)}): stop its processes first, or give --force")
    doomed = checked_folder(Path(folder.decode()), name) if with_folder and folder is not None else None
    Scripts(client, keys)("write_record", "HSET", "run", "status", "deleting")
    removed = _unlink(client, keys)
    if (broker := broker_client(client)) is not client:
        removed += _unlink(broker, keys)
    if config is not None:
        remove_policies(parse_config(config.decode(), source=f"stored config of run {name}"), name)
    if doomed is not None:
        shutil.rmtree(doomed)
    client.hdel(RUNS, name)  # before the record: a run created after that has an entry of its own
    return removed + int(client.unlink(keys("run")))


def checked_folder(folder: Path, name: str) -> Path:
    """A run folder that may be removed whole. Raises ConfigError for any other."""
    if folder.name != name or not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not the run folder of {name} on this machine: remove it by hand; nothing was done"
        )
    return folder


def remove_policies(config: Config, name: str) -> None:
    """The published policies of a run that lie in a folder of this machine."""
    from sluice.common.policies.store import store_folder

    if config.policy_store.transport == "directory":
        shutil.rmtree(store_folder(config.policy_store, name), ignore_errors=True)


def scan_keys(client: redis.Redis, root: str) -> Iterator[bytes]:
    """Keys that begin with a root, whatever signs of a pattern are in it."""
    pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", root) + "*"
    yield from client.scan_iter(match=pattern, count=_PAGE)


def _unlink(client: redis.Redis, keys: Keys) -> int:
    """All keys of a run but its record, in batches."""
    removed, batch = 0, []
    for key in scan_keys(client, keys.root):
        if key.decode() != keys("run"):
            batch.append(key)
        if len(batch) == _PAGE:
            removed += int(client.unlink(*batch))
            batch = []
    return removed + (int(client.unlink(*batch)) if batch else 0)
