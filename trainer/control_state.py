"""The control state as the trainer reads it: before each batch, and while it waits for one.

Each new entry of the change log becomes a line of metrics.jsonl, once, also over restarts of the trainer.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from sluice.common.operations.control import ControlState, at, describe_paused, read_control_state, with_settings
from sluice.common.run import Run
from sluice.trainer.step_metrics import append_line

log = logging.getLogger("sluice.trainer")

HELD_POLL_S = 0.5
"""How often a paused trainer checks whether it still is."""


class ControlReader:
    """The control state in force, and the config that follows from it."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client, self._run = client, run
        self._path = Path(run.folder) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._last_entry = _last_logged(self._path)
        self.state = ControlState()
        self.config = run.config
        self._changed: set[str] = set()

    def metrics(self) -> dict[str, float]:
        """Return `setting/<key>`: the current values of changed keys, so that every tracker shows when they changed."""
        values = {key: at(self.config, key) for key in sorted(self._changed)}
        return {f"setting/{key}": float(value) for key, value in values.items() if value is not None}

    def read(self) -> None:
        """Refresh `state` and `config`."""
        before = self.state
        self.state = read_control_state(self._client, self._run.keys, after=self._last_entry)
        if self.state.settings != before.settings:
            self.config = with_settings(self._run.config, self.state.settings)
            self._changed |= self.state.settings.keys()
        if self.state.paused and not before.paused:
            log.warning("%s", describe_paused(self.state.paused))
        for entry, fields in self.state.change_log:
            line: dict[str, Any] = {"step": int(fields["step"]), "time": float(fields["at"])}
            line |= {"control": fields["key"], "who": fields["who"], "entry": entry}
            append_line(self._path, line | {name: json.loads(fields[name]) for name in ("old", "new")})
            log.info("%s: %s from %s to %s", fields["who"], fields["key"], fields["old"], fields["new"])
            self._last_entry = entry


def _last_logged(path: Path) -> str:
    """Return the entry id of the newest change that is in the file."""
    entry = "0"
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if b'"control": ' in line:
                    with suppress(ValueError, KeyError):  # a torn line
                        entry = str(json.loads(line)["entry"])
    return entry
