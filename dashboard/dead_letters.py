"""Dead-lettered groups for display: their content, their last holder, and the reason."""

from __future__ import annotations

from typing import Any

import redis
from rich.console import Group, RenderableType

from sluice.common.errors import ConfigError, SerializationError
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_dead, read_fields
from sluice.common.serialization import decode
from sluice.dashboard.terminal import plain_text, table

_FIELDS = ("dead_reason", "dead_worker", "dead_detail", "task", "rollout")


def not_dead(group: str) -> ConfigError:
    return ConfigError(f"group {group} is not a dead letter of this run: `sluice dead` lists them")


def read_dead_letters(
    client: redis.Redis, keys: Keys, *, group: str | None = None, count: int | None = None
) -> list[dict[str, Any]]:
    """Return dead letters, newest first, at most `count`; only that of `group` where given. Raises ConfigError."""
    names = read_dead(client, keys)
    if group is not None and group not in names:
        raise not_dead(group)
    chosen = dict(list(names.items())[:count]) if group is None else {group: names[group]}
    rows = read_fields(client, keys, list(chosen), _FIELDS)
    return [_letter(name, chosen[name], row) for name, row in zip(chosen, rows, strict=True)]


def _letter(name: str, died_at: float, row: list[bytes | None]) -> dict[str, Any]:
    reason, worker, detail, task, rollout = row
    prompt, target = _read(task, "prompt"), _read(task, "target")
    completions = _read(rollout, "completions") or []
    return {
        "group": name,
        "died_at": died_at,
        "reason": (reason or b"?").decode(),
        "worker": (worker or b"?").decode(),
        "detail": (detail or b"").decode(errors="replace"),
        "prompt": prompt,
        "target": target,
        "completions": [text for completion in completions if (text := completion.get("text")) is not None],
    }


def _read(payload: bytes | None, name: str) -> Any:
    """Return one field of a result; None if it cannot be decoded, which may be why the group was dead-lettered."""
    try:
        return decode(payload)[name] if payload else None
    except (SerializationError, LookupError, TypeError):
        return None


def render_dead(letters: list[dict[str, Any]]) -> RenderableType:
    """Render one line per dead letter, and the details if there is only one."""
    rows = [
        {name: letter[name] for name in ("group", "reason", "worker", "prompt")}
        | {"detail": letter["detail"].partition("\n")[0]}
        for letter in letters
    ]
    if len(letters) != 1:
        return table(rows)
    return Group(
        table(rows), plain_text(letters[0]["detail"]), *(plain_text(f"- {text}") for text in letters[0]["completions"])
    )
