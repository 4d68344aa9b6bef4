"""What operators have ordered, as the trainer goes by it: read before each batch, and while it waits for one.

Each order that is new becomes a line of metrics.jsonl, once, also over restarts of the trainer.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

import redis

from sluice.common.operations.control import ControlState, at, describe_paused, read_control_state, with_settings
from sluice.common.run import Run
from sluice.trainer.report import append_line

log = logging.getLogger("sluice.trainer")

HELD_POLL_S = 0.5
"""While the run is paused, how often the trainer looks whether it still is."""


class ControlReader:
    """The orders in force, and the config that follows from them."""

    def __init__(self, client: redis.Redis, run: Run) -> None:
        self._client, self._run = client, run
        self._path = Path(run.folder) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._told = _last_logged(self._path)
        self.control_state = ControlState()
        self.config = run.config
        self._changed: set[str] = set()

    def metrics(self) -> dict[str, float]:
        """`setting/<key>`: the numbers in force of keys that were changed, so that every tracker shows when they were."""
        values = {key: at(self.config, key) for key in sorted(self._changed)}
        return {f"setting/{key}": float(value) for key, value in values.items() if value is not None}

    def read(self) -> None:
        """Look again: `control_state` and `config` are those in force now."""
        before, self.control_state = (
            self.control_state,
            read_control_state(self._client, self._run.keys, after=self._told),
        )
        if self.control_state.settings != before.settings:
            self.config = with_settings(self._run.config, self.control_state.settings)
            self._changed |= self.control_state.settings.keys()
        if self.control_state.paused and not before.paused:
            log.warning("%s", describe_paused(self.control_state.paused))
        for entry, fields in self.control_state.change_log:
            line = {
                "step": int(fields["step"]),
                "time": float(fields["at"]),
                "control": fields["key"],
                "who": fields["who"],
            }
            append_line(
                self._path, line | {name: json.loads(fields[name]) for name in ("old", "new")} | {"entry": entry}
            )
            log.info("%s: %s from %s to %s", fields["who"], fields["key"], fields["old"], fields["new"])
            self._told = entry


def _last_logged(path: Path) -> str:
    """Entry id of the newest order that is in the file."""
    told = "-"
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if b'"control": ' in line:
                    with suppress(ValueError, KeyError):  # a torn line
                        told = str(json.loads(line)["entry"])
    return told
