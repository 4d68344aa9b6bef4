"""Names of everything a run keeps in Redis. The layout is documented at the top of `lua/prelude.lua`.

Everything of a run lives under `sluice:{run}:`, Celery's queues included, so that several runs share one server and one
run can be removed without touching another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sluice.common.errors import ConfigError

RUNS = "sluice:runs"
"Hash: run name -> seconds of creation."

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one run."""

    run: str

    def __post_init__(self) -> None:
        if not _RUN_NAME.fullmatch(self.run):
            raise ConfigError(
                f"run name {self.run!r}: use letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit"
            )

    @property
    def root(self) -> str:
        return f"sluice:{{{self.run}}}:"

    @property
    def celery_prefix(self) -> str:
        return f"{self.root}mq:"

    def __call__(self, *parts: object) -> str:
        """`keys("g", "t7")` is `sluice:{run}:g:t7`."""
        return self.root + ":".join(str(part) for part in parts)
