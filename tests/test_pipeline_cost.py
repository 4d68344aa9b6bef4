"""What a group costs in Redis does not grow with the groups that wait: one pair of sizes of benchmarks/pipeline.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sluice.scripts.launcher.redis_server import EmbeddedServer


def test_a_backlog_makes_no_group_dearer(own_redis: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from pipeline import backlog

    few, many = (backlog(own_redis.url, size, repeats=16, rounds=6)["steps_ms"] for size in (100, 10_000))
    # a hundred times the groups: a step that looks at each of them would take many times as long
    assert all(many[step] < 3 * few[step] + 0.1 for step in few), (few, many)
