"""Manifests of the published versions, and the chain that they form: which versions one consists of.

    v0 whole <- v1 <- v2 ... <- v15 <- v16 delta and whole <- v17 ...        policy_store.anchor_every = 16

A version is stored whole, as a delta (`common/policies/delta.py`) on the version published before it, its *base*, or as both.
"""

from __future__ import annotations

import redis

from sluice.common.errors import PolicyError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.signing import Signer


class ManifestChain:
    """The manifests of one run in Redis."""

    def __init__(self, client: redis.Redis, keys: Keys, signer: Signer) -> None:
        self._client, self._keys, self._signer = client, keys, signer
        self._scripts = Scripts(client, keys)
        self._known_bases: dict[int, int] = {}

    def read(self, version: int) -> Manifest:
        """Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        sealed = self._client.hget(self._keys("manifests"), str(version))
        if sealed is None:
            raise PolicyNotFound(f"policy version {version} was never published in this run, or was removed")
        return Manifest.opened(sealed, self._signer, version=version)

    def record(self, manifest: Manifest) -> None:
        """Write the manifest of a version whose tensors are written, also while Redis is full."""
        self._scripts("small", "HSET", "manifests", manifest.version, manifest.sealed(self._signer))
        self._known_bases[manifest.version] = manifest.rests_on

    def remove(self, version: int) -> None:
        self._client.hdel(self._keys("manifests"), str(version))
        self._known_bases.pop(version, None)

    def versions(self) -> list[int]:
        """Those that have a manifest, ascending."""
        return sorted(int(version) for version in self._client.hkeys(self._keys("manifests")))

    def base_chain(self, version: int) -> list[int]:
        """The versions that this one rests on, down to a whole one."""
        found: list[int] = []
        while True:
            if version not in self._known_bases:
                try:
                    self._known_bases[version] = self.read(version).rests_on
                except PolicyError:
                    return found
            version = self._known_bases[version]
            if version < 0:
                return found
            found.append(version)

    def path(self, target: Manifest, *, start: Manifest | None) -> list[Manifest]:
        """From `start` (none = the nearest whole version) to `target`, both included. Raises PolicyNotFound."""
        path = [target]
        while path[-1].num_bytes == 0 if start is None else path[-1].version > start.version:
            if path[-1].base < 0:
                raise PolicyNotFound(f"policy version {path[-1].version} is stored whole, not as a delta")
            path.append(self.read(path[-1].base))
        if start is not None and path[-1].digest != start.digest:
            raise PolicyNotFound(
                f"the chain of policy version {target.version} does not lead to version {start.version}"
            )
        return path[::-1]
