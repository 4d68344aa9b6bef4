"""The Lua scripts of a run: each one transition of the ledger, atomic and idempotent.

`Scripts(client, keys)("claim", group, stage, ...)` runs `lua/claim.lua` with the shared prelude in front. Scripts are
loaded by digest and loaded again by redis-py when a restarted server forgot them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import redis
from redis.commands.core import Script

from sluice.common.keys import Keys

_WAITS_WHEN_FULL = frozenset(["admit", "admit_eval", "claim", "reap", "recover", "requeue", "store"])
"""Refused entirely while Redis is at maxmemory: what stores payloads, and what begins work or judges its deadlines.
Every other script works then too, or memory would never be freed."""

_READS = frozenset(["counters"])
"""Write nothing, not even the first empty write: users with read access only call them."""


@cache
def _source(name: str) -> str:
    folder = files("sluice.common.ledger") / "lua"
    guard = "refuse_when_full()" if name in _WAITS_WHEN_FULL else "" if name in _READS else "write_when_full()"
    return f"{(folder / 'prelude.lua').read_text()}\n{guard}\n{(folder / f'{name}.lua').read_text()}"


class Scripts:
    """Callable by script name; `client=` may be a pipeline, to send several in one round trip."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._root = keys.root
        self._scripts: dict[str, Script] = {}

    def __call__(self, name: str, *args: Any, client: Any = None) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._client.register_script(_source(name))
        return script(keys=[self._root], args=args, client=client)
