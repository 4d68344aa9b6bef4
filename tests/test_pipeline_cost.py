"""What a group costs in Redis does not grow with the groups that wait: one pair of sizes of benchmarks/pipeline.py."""

from __future__ import annotations

from benchmarks.pipeline import backlog
from sluice.scripts.launcher.redis_server import EmbeddedServer


def test_a_backlog_makes_no_group_dearer(own_redis: EmbeddedServer) -> None:
    few, many = (backlog(own_redis.url, size, repeats=16, rounds=6)["steps_ms"] for size in (100, 10_000))
    # a hundred times the groups: a step that looks at each of them would take many times as long
    assert all(many[step] < 3 * few[step] + 0.1 for step in few), (few, many)
