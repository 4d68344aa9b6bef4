"""What must be true of everything that a run keeps in Redis, whatever happened to it."""

from __future__ import annotations

from collections import Counter

import redis
from builders import make_ledger

from sluice.common.keys import Keys
from sluice.common.pipeline import KINDS, STAGES

PARTS = tuple(stage.name for stage in STAGES)
FIXED = {
    "run", "cursor", "counts:train", "counts:eval", "totals", "live:train", "live:eval", "credit", "deadlines", "versions",
    "batches", "want", "wake", "policy", "lineage", "publications", "events", "bytes", "dead", "dead_bytes", "evaluations",
    "settled", "ahead", "filtered", "settings", "controls", "autoscale", "ends", "lost",
}  # fmt: skip


def assert_consistent(client: redis.Redis, keys: Keys) -> None:
    """Everything under the prefix is accounted for: one place per group, no orphan, bytes that add up. Nothing may run."""
    names = {key.decode().removeprefix(keys.root) for key in client.scan_iter(match=keys.root + "*", count=1000)}
    members = {kind: {g.decode() for g in client.smembers(keys.live(kind))} for kind in ("train", "eval")}
    live = members["train"] | members["eval"]
    dead = {g.decode() for g in client.zrange(keys.dead, 0, -1)}
    assert not live & dead
    assert not members["train"] & members["eval"]
    pending_groups = {line.decode().rpartition("|")[0] for line in client.zrange(keys.deadlines, 0, -1)}
    assert pending_groups <= live, "a deadline of a settled group"
    due = {line.decode() for line in client.zrange(keys.deadlines, 0, -1)}
    assert due == {f"{g}|{s.decode()}" for g in pending_groups for s in client.smembers(keys.pending(g))}
    assert {g.decode() for g in client.smembers(keys.credit)} <= members["train"]

    versions = [int(v) for v in client.zrange(keys.versions, 0, -1)]
    steps = [int(s) for s in client.zrange(keys.batches, 0, -1)]
    entries = [
        (str(v), entry.decode(), fields[b"group"].decode())
        for v in versions
        for entry, fields in client.xrange(keys.stream(v))
    ]
    leased = [tuple(line.decode().split("|")) for s in steps for line in client.lrange(keys.batch(s), 0, -1)]
    pending = [
        (str(v), item["message_id"].decode())
        for v in versions
        for item in client.xpending_range(keys.stream(v), "trainer", "-", "+", 100_000)
    ]
    in_stream = Counter(group for _, _, group in entries)
    assert max(in_stream.values(), default=1) == 1, "a group stands twice in the buffer"
    assert len({group for _, _, group in leased}) == len(leased), "a group is leased by two steps"
    assert set(leased) <= set(entries)
    assert sorted((v, e) for v, e, _ in leased) == sorted(pending), "pending entries are those that a manifest names"
    assert set(in_stream) <= members["train"]
    assert live == pending_groups | set(in_stream), "a group without a pending stage that is not in the buffer"
    assert not pending_groups & set(in_stream)

    groups = {name[2:] for name in names if name.startswith("g:")}
    assert groups == live | dead
    held = {group: client.hgetall(keys.group(group)) for group in groups}
    total = sum(len(held[g].get(stage.encode(), b"")) for g in live for stage in PARTS)
    assert total == int(client.get(keys.payload_bytes) or 0)
    letters = sum(1024 + int(held[g].get(b"bytes", 0)) + len(held[g][b"dead_detail"]) for g in dead)
    assert letters == int(client.get(keys.dead_bytes) or 0)
    for group in groups:
        assert sum(len(held[group].get(p.encode(), b"")) for p in PARTS) == int(held[group].get(b"bytes", 0))
    by_place = dict.fromkeys(in_stream, "ready") | {group: "leased" for _, _, group in leased}
    assert {g: held[g][b"stage"].decode() for g in by_place} == by_place

    known = FIXED | {name for name in names if name.startswith("eval:")}
    known |= {f"g:{g}" for g in groups} | {f"pending:{g}" for g in pending_groups}
    known |= {f"stream:{v}" for v in versions} | {f"batch:{s}" for s in steps}
    assert names <= known, names - known
    for kind in ("train", "eval"):
        counters = make_ledger(client, keys).counters(kind)
        assert counters.holds, counters
        assert counters.in_flight == len(members[kind])
    both = [make_ledger(client, keys).counters(kind) for kind in KINDS]
    assert sum(sum(counters.dead.values()) - counters.discarded for counters in both) == len(dead)
