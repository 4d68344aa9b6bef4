"""The age of a policy version: its distance from the current one, in optimizer steps, through the fork if there is one.

    v5 (step 5) --- v6 --- v7            the trainer died here and resumed from its checkpoint at step 5
         \\--- v8 (step 5) --- v9         as v8: the age of v7 seen from v9 is 2 (7 to 5) + 1 (5 to 6) = 3

Versions only grow, so a parent is always smaller than its child; lua/prelude.lua has the same rule for eviction. If v9 equals
v6 bit for bit (training is deterministic, and the batch was the same), its parent is v6 at distance 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import NamedTuple

import redis

from sluice.common.errors import PolicyNotFound, SerializationError
from sluice.common.keys import Keys
from sluice.common.serialization import decode_int

log = logging.getLogger("sluice.policy_store")

_NUMBER = re.compile(rb"-?[0-9]{1,18}")
_POINTER = {
    **dict.fromkeys([b"version", b"step", b"incarnation", b"bytes"], _NUMBER),
    b"published_at": re.compile(rb"[0-9]{1,18}(\.[0-9]{1,40})?"),
    b"digest": re.compile(rb"[!-~]{0,128}"),
}


@lru_cache(maxsize=1000)
def _say_ignored(where: str, reason: str) -> None:
    """Log once what is ignored: readers come back at every step."""
    log.warning("%s holds what cannot be read, and is ignored: %s", where, reason)


class Version(NamedTuple):
    """One entry of the lineage."""

    parent: int
    "-1 = none"
    step: int
    "trainer step that made it"
    digest: str = ""
    "once it is published"

    @classmethod
    def from_wire(cls, version: int, value: bytes) -> Version:
        """Decode the entry of a version. Raises SerializationError, also for a parent that is not older."""
        parent, step, *digest = value.split(b":")[:3] + [b""] * (1 - value.count(b":"))
        found = cls(decode_int(parent), decode_int(step), *(text.decode(errors="replace") for text in digest))
        if found.parent >= version:
            raise SerializationError(f"policy version {version} has parent {found.parent}, which is not older")
        return found


def read_versions(found: Iterable[bytes], *, where: str) -> set[int]:
    """Return the policy versions that Redis names in a place; what is not a number is ignored, and logged."""
    versions = set()
    for text in found:
        try:
            versions.add(decode_int(text))
        except SerializationError as error:
            _say_ignored(where, str(error))
    return versions


def read_lineage(client: redis.Redis, keys: Keys) -> dict[int, Version]:
    """Return every version that was announced or published; an entry that cannot be read is ignored, and logged."""
    found = {}
    for version, value in client.hgetall(keys.lineage).items():
        try:
            found[decode_int(version)] = Version.from_wire(decode_int(version), value)
        except SerializationError as error:
            _say_ignored(keys.lineage, str(error))
    return found


def read_pointer(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Return the served version, digest, step, incarnation, bytes, published_at; empty before the first publication.

    Of fields that cannot be read only `unreadable` is there, which names them.
    """
    found, unreadable = {}, []
    for name, value in client.hgetall(keys.policy).items():
        if (form := _POINTER.get(name)) and form.fullmatch(value):
            found[name.decode()] = value.decode()
        elif form:
            unreadable.append(f"{name.decode()} {value[:40]!r}")
    return found | ({"unreadable": ", ".join(unreadable)} if unreadable else {})


def policy_ages(client: redis.Redis, keys: Keys, versions: list[int], *, current: int) -> list[int]:
    """Return ages of versions seen from the current one. Raises PolicyNotFound for a version outside the lineage."""

    @cache
    def node(version: int) -> Version:
        value = client.hget(keys.lineage, str(version))
        try:
            if value is not None:
                return Version.from_wire(version, value)
        except SerializationError as error:
            _say_ignored(keys.lineage, str(error))
        raise PolicyNotFound(f"policy version {version} is not in the lineage of run {keys.run}")

    @cache
    def age(version: int) -> int:
        a, b = version, current
        while a != b:
            a, b = (node(a).parent, b) if a > b else (a, node(b).parent)
        return node(version).step + node(current).step - 2 * node(a).step

    return [age(version) for version in versions]


def equal_versions(lineage: Mapping[int, Version], version: int) -> list[int]:
    """Return the versions that hold the policy of this one, made at the same step, itself included, ascending."""
    own = lineage.get(version)
    if own is None or not own.digest:
        return [version]
    return sorted(v for v, other in lineage.items() if (other.step, other.digest) == (own.step, own.digest))


def abandoned_versions(client: redis.Redis, keys: Keys, *, after_step: int) -> dict[int, dict[str, int]]:
    """Return what a trainer that resumes at `after_step` abandons: trainer step -> digest -> published version."""
    found: dict[int, dict[str, int]] = {}
    for version, (_, step, digest) in read_lineage(client, keys).items():
        if digest and step > after_step:
            found.setdefault(step, {})[digest] = version
    return found
