"""The age of a policy version: its distance from the current one, in optimizer steps, through the fork if there is one.

    v5 (step 5) --- v6 --- v7            the trainer died here and resumed from its checkpoint at step 5
         \\--- v8 (step 5) --- v9         as v8: the age of v7 seen from v9 is 2 (7 to 5) + 1 (5 to 6) = 3

Versions only grow, so a parent is always smaller than its child; the same rule stands in lua/prelude.lua for eviction.
Should v9 come out bit for bit as v6 (training is deterministic, and the batch was the same), its parent is v6 at no distance.
"""

from __future__ import annotations

import redis

from sluice.common.errors import PolicyNotFound
from sluice.common.keys import Keys


def policy_ages(client: redis.Redis, keys: Keys, versions: list[int], *, current: int) -> list[int]:
    """Ages of versions seen from the current one. Raises PolicyNotFound for a version outside the lineage."""
    known: dict[int, tuple[int, int]] = {}

    def node(version: int) -> tuple[int, int]:
        if version not in known:
            value = client.hget(keys("lineage"), str(version))
            if value is None:
                raise PolicyNotFound(f"policy version {version} is not in the lineage of run {keys.run}")
            parent, step = value.decode().split(":")[:2]
            known[version] = int(parent), int(step)
        return known[version]

    def age(version: int) -> int:
        a, b = version, current
        while a != b:
            a, b = (node(a)[0], b) if a > b else (a, node(b)[0])
        return node(version)[1] + node(current)[1] - 2 * node(a)[1]

    ages = {version: age(version) for version in set(versions)}
    return [ages[version] for version in versions]


def abandoned_versions(client: redis.Redis, keys: Keys, *, after_step: int) -> dict[int, dict[str, int]]:
    """What a trainer that went back to `after_step` leaves behind: trainer step -> digest -> published version."""
    found: dict[int, dict[str, int]] = {}
    for version, value in client.hgetall(keys("lineage")).items():
        _, step, *digest = value.decode().split(":")
        if digest and int(step) > after_step:
            found.setdefault(int(step), {})[digest[0]] = int(version)
    return found
