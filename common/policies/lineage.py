"""The age of a policy version: its distance from the current one, in optimizer steps, through the fork if there is one.

    v5 (step 5) --- v6 --- v7            the trainer died here and resumed from its checkpoint at step 5
         \\--- v8 (step 5) --- v9         as v8: the age of v7 seen from v9 is 2 (7 to 5) + 1 (5 to 6) = 3

Versions only grow, so a parent is always smaller than its child; lua/prelude.lua has the same rule for eviction. If v9 equals
v6 bit for bit (training is deterministic, and the batch was the same), its parent is v6 at distance 0.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import redis

from sluice.common.errors import PolicyNotFound
from sluice.common.keys import Keys


class Version(NamedTuple):
    """One entry of the lineage."""

    parent: int
    "-1 = none"
    step: int
    "trainer step that made it"
    digest: str = ""
    "once it is published"

    @classmethod
    def from_wire(cls, value: bytes) -> Version:
        parent, step, *digest = value.decode().split(":")
        return cls(int(parent), int(step), *digest)


def read_lineage(client: redis.Redis, keys: Keys) -> dict[int, Version]:
    """Return every version that was announced or published."""
    return {int(version): Version.from_wire(value) for version, value in client.hgetall(keys.lineage).items()}


def read_pointer(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Return the served version, digest, step, incarnation, bytes, published_at; empty before the first publication."""
    return {name.decode(): value.decode() for name, value in client.hgetall(keys.policy).items()}


def policy_ages(client: redis.Redis, keys: Keys, versions: list[int], *, current: int) -> list[int]:
    """Return ages of versions seen from the current one. Raises PolicyNotFound for a version outside the lineage."""

    @cache
    def node(version: int) -> Version:
        value = client.hget(keys.lineage, str(version))
        if value is None:
            raise PolicyNotFound(f"policy version {version} is not in the lineage of run {keys.run}")
        return Version.from_wire(value)

    @cache
    def age(version: int) -> int:
        a, b = version, current
        while a != b:
            a, b = (node(a).parent, b) if a > b else (a, node(b).parent)
        return node(version).step + node(current).step - 2 * node(a).step

    return [age(version) for version in versions]


def abandoned_versions(client: redis.Redis, keys: Keys, *, after_step: int) -> dict[int, dict[str, int]]:
    """Return what a trainer that resumes at `after_step` abandons: trainer step -> digest -> published version."""
    found: dict[int, dict[str, int]] = {}
    for version, (_, step, digest) in read_lineage(client, keys).items():
        if digest and step > after_step:
            found.setdefault(step, {})[digest] = version
    return found
