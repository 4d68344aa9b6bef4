"""A run of which only the folder is left: its files, as far as the overview needs them, and the logs of its roles."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from sluice.common.config.file import parse_config
from sluice.common.disk import read_json_lines, read_tail
from sluice.common.errors import ConfigError
from sluice.common.pipeline import QUEUES

MAX_METRICS_BYTES = 64 << 20
"Newest part of metrics.jsonl that is read."
LOG_BYTES = 64 << 10
"Newest part of a log that is shown."


def read_folder(folder: Path, *, max_steps: int) -> dict[str, Any]:
    """Return the status, config, steps, evaluations and events that the files of a run folder hold. Raises ConfigError."""
    steps: dict[int, dict[str, float]] = {}
    evaluations, events = [], []
    for line in read_json_lines(folder / "metrics.jsonl", max_bytes=MAX_METRICS_BYTES):
        if "reward/mean" in line:
            steps[int(line["step"])] = line
        if any(name.startswith("eval/") for name in line):
            evaluations.append(line)
        if "control" in line:
            fields = {"key": line["control"], "who": line["who"], "old": line["old"], "new": line["new"]}
            events.append({"event": "setting", "at": line["time"], "step": line["step"]} | fields)
    kept = [steps[step] for step in sorted(steps)[-max_steps:]]
    config = parse_config(_text(folder / "config.yaml"), source=f"config of run {folder.name}")
    return {
        "status": _status(folder, config.trainer.num_steps, kept),
        "config": config,
        "steps": kept,
        "evaluations": evaluations,
        "events": [{name: str(value) for name, value in event.items()} for event in events],
    }


def _status(folder: Path, num_steps: int, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Return what `collect_status` returns of a run, as far as the files say it."""
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text())
    newest = steps[-1] if steps else {}
    ledgers = {"train": summary.get("ledger"), "eval": summary.get("ledger_eval")}
    return {
        "run": folder.name,
        "status": "ended",
        "failure": None,
        "step": int(newest.get("step", 0)),
        "num_steps": num_steps,
        "reward": newest.get("reward/mean"),
        "policy_age": newest.get("staleness/mean"),
        "trained_tokens_per_s": newest.get("throughput/trained_tokens_per_s"),
        "policy": {"version": int(newest["version"]) if "version" in newest else None},
        "age_of_last_step_s": None,
        "stalled_by": None,
        "alarms": [],
        "processes": {},
        "queues": dict.fromkeys(QUEUES, 0),
        "ledger": {kind: counters for kind, counters in ledgers.items() if counters},
        "metrics": newest,
    }


def log_names(folder: Path) -> list[str]:
    """Return the logs of the roles that `sluice run` has started, by name."""
    return sorted(path.name.removesuffix(".log") for path in (folder / "logs").glob("*.log"))


def read_log(folder: Path, name: str) -> str:
    """Return the newest LOG_BYTES of a role's log. Raises ConfigError where there is none of that name."""
    if name not in log_names(folder):
        raise ConfigError(f"there is no log {name!r} in {folder / 'logs'}")
    return read_tail(folder / "logs" / f"{name}.log", LOG_BYTES).decode(errors="replace")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
