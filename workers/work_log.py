"""What a worker process says now and then in its log: how much it did, and that it has nothing to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("sluice.worker")

LOGGED_EVERY_S = 20.0


class WorkLog:
    """Logs the stats of a process every LOGGED_EVERY_S; while it has nothing to do, only once."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._logged_at = time.monotonic()
        self._num_done = self._num_tokens = 0
        self._busy_s = 0.0
        self._was_idle = False

    def update(self, stats: Mapping[str, Any], *, busy_s: float) -> None:
        """Look at the stats of a heartbeat. busy_s: seconds of work of the process so far."""
        now = time.monotonic()
        if (passed_s := now - self._logged_at) < LOGGED_EVERY_S:
            return
        num_new, total = stats["done"] - self._num_done, f"{stats['done']} in all"
        is_idle = not num_new and not stats["running"]
        if not is_idle:
            words = [f"{num_new} groups in {passed_s:.0f} s ({total})", f"{stats['running']} in progress"]
            if "generated_tokens" in stats:
                words.append(f"{(stats['generated_tokens'] - self._num_tokens) / passed_s:,.0f} tokens/s")
            words += [f"policy version {stats['version']}"] if "version" in stats else []
            log.info("%s: %s, busy %.0f %%", self._role, ", ".join(words), 100 * (busy_s - self._busy_s) / passed_s)
        elif not self._was_idle:
            log.info("%s: nothing to do for %.0f s (%s)", self._role, passed_s, total)
        self._logged_at, self._was_idle, self._busy_s = now, is_idle, busy_s
        self._num_done, self._num_tokens = stats["done"], stats.get("generated_tokens", 0)
