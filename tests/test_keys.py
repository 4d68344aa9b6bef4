"""Names of keys: each is in the layout at the top of the ledger's prelude, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builders import for_each

from sluice.common.errors import ConfigError
from sluice.common.keys import Keys

PRELUDE = Path(__file__).parent.parent / "common" / "ledger" / "lua" / "prelude.lua"


def documented() -> set[str]:
    """Keys of the comment without the run's root: `cursor`, `stream:<>`."""
    comment = PRELUDE.read_text().partition("\n\n")[0]
    rows = re.findall(r"^--   (\S.*?) {2,}(?:hash|z?set|list|string|stream)\b", comment, flags=re.M)
    return {re.sub("<.*>", "<>", name) for row in rows for name in row.split(", ")}


def named() -> set[str]:
    keys = Keys("x")
    found = set()
    for name in set(dir(keys)) - {"root", "run", "celery_prefix", "tensors"}:
        if not name.startswith("_"):
            key = getattr(keys, name)
            found.add((key if isinstance(key, str) else key("<>")).removeprefix(keys.root))
    return found | {keys.tensors(kind, "<>").removeprefix(keys.root) for kind in ("weights", "delta")}


def test_the_layout_in_the_prelude_has_every_key_and_no_other() -> None:
    assert named() == documented()


def test_keys_of_a_run_are_under_its_root() -> None:
    keys = Keys("a")
    assert keys.cursor == "sluice:{a}:cursor"
    assert keys.group("t7") == "sluice:{a}:g:t7"
    assert keys.tensors("delta", 3, 0) == "sluice:{a}:delta:3:0"
    assert keys.celery_prefix == "sluice:{a}:mq:"


@for_each("name", ["", "{x}", "a b", ".hidden", "x" * 101, "a:b"])
def test_a_name_that_would_leave_the_root_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        Keys(name)
