"""Policy versions as their readers see them: `served()`, `fetch(version)`.

    manifest -> verify its signature (`common/policies/signing.py`) -> tensors -> verify every digest; what cannot be verified is
    never served

A process that fetched one of the last versions applies the deltas since; another begins at the nearest whole version. A reader
that cannot verify a version asks for it whole, and the trainer writes it so: a damaged delta costs that version's time, not a
dead chain.

Digests are those of the result: xxh3-128 per tensor; the manifest's own digest is the sha256 of all of them. `fetch` computes
both from the bytes in memory, so a worker that reports a manifest's digest has proved it.

Memory: a reader holds the version that it fetched last, unless that is fp32 and came whole (the next one will too). Tensors are
shared between versions where they did not change, so nothing may be written to them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.errors import DigestMismatch, PolicyError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies import delta
from sluice.common.policies.digest import policy_digest
from sluice.common.policies.manifest import Manifest, ManifestChain, Policy
from sluice.common.policies.retention import Retention
from sluice.common.policies.signing import Signer
from sluice.common.policies.transports import open_transport

log = logging.getLogger("sluice.policy_store")


class PolicyReader:
    """Retrieval of policy versions, over either transport."""

    def __init__(
        self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, *, signer: Signer | None = None
    ) -> None:
        """signer: by default with the key of the environment, if there is one."""
        self._client, self._keys = client, keys
        self._full_every = config.full_every if config.delta else 1
        self._chain = ManifestChain(client, keys, signer or Signer.of_environment(keys.run))
        self._transport = open_transport(client, keys, config)
        self._retention = Retention(client, keys, chain=self._chain, transport=self._transport, keep=config.keep)
        self._scripts = Scripts(client, keys)
        self._held: Policy | None = None
        "the version that the next one may be a delta on"
        self.last_fetch_s = 0.0
        self.last_fetch_bytes = 0

    def latest(self) -> Manifest | None:
        """The manifest that the pointer names; none before the first publication."""
        version = self._client.hget(self._keys("policy"), "version")
        return None if version is None else self.manifest(int(version))

    def latest_version(self) -> int:
        """The version that the pointer names; -1 before the first publication."""
        return self.served()[0]

    def served(self) -> tuple[int, str]:
        """Version and digest that the pointer names; (-1, "") before the first publication."""
        version, digest = self._client.hmget(self._keys("policy"), ["version", "digest"])
        return (-1, "") if version is None else (int(version), (digest or b"").decode())

    def manifest(self, version: int) -> Manifest:
        """Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        return self._chain.read(version)

    def fetch(self, version: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Verified tensors of a version, not to be written to. Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        began = time.monotonic()
        # A reader is entered before it looks at the manifest, so that what that names cannot be collected under it.
        with self._retention.reading(version) as go_on:
            manifest = self.manifest(version)
            held = self._held if self._held and self._held.manifest.version < version else None
            try:
                tensors, num_bytes = self._load_somehow(manifest, held=held, go_on=go_on)
            except PolicyError:
                self._scripts("write_record", "SET", "full_requested", version)
                raise
        # Held only where the next version may come as a delta: otherwise it would be memory for nothing.
        has_deltas = manifest.base >= 0 or any(tensor.dtype != torch.float32 for tensor in tensors.values())
        self._held = Policy(manifest=manifest, tensors=tensors) if has_deltas and self._full_every > 1 else None
        self.last_fetch_s, self.last_fetch_bytes = time.monotonic() - began, num_bytes
        return manifest, tensors

    def _load_somehow(
        self, target: Manifest, *, held: Policy | None, go_on: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """By the deltas since what is held; failing that, from whole weights."""
        if held is not None and target.base >= 0:
            try:
                return self._load(target, held=held, go_on=go_on)
            except PolicyError as error:
                log.warning("no way from version %d, reading whole weights: %s", held.manifest.version, error)
        return self._load(target, held=None, go_on=go_on)

    def _load(
        self, target: Manifest, *, held: Policy | None, go_on: Callable[[], None]
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Verified tensors, and the bytes read."""
        # Read what the version consists of: whole weights, unless they are held, and the patches of every version since.
        first, *deltas = self._chain.path(target, start=held.manifest if held else None)
        base, num_bytes = (held.tensors, 0) if held else self._transport.read(first.version, go_on=go_on)
        patches: dict[str, list[torch.Tensor]] = {name: [] for name in base}
        for manifest in deltas:
            tensors, size = self._transport.read(manifest.version, "delta", go_on=go_on)
            num_bytes += size
            for name, patch in tensors.items():
                patches.setdefault(name, []).append(patch)
        if patches.keys() != target.tensors.keys() or patches.keys() != base.keys():
            raise DigestMismatch(f"policy version {target.version} holds other tensors than its manifest names")

        # Every tensor has the digest that the manifest names, computed from the memory that is served: what was read is copied
        # as it is verified, since a mapped file's pages may be gone while an engine serves them. A held tensor was verified.
        found, digests = {}, {}
        for name, digest in target.tensors.items():
            if patches[name] or held is None:
                try:
                    found[name], digests[name] = delta.apply(base[name], patches[name])
                except DigestMismatch as error:
                    raise DigestMismatch(f"policy version {target.version}: tensor {name}: {error}") from None
            else:
                found[name], digests[name] = base[name], held.manifest.tensors[name]
            if digests[name] != digest:
                raise DigestMismatch(f"policy version {target.version}: tensor {name} does not match its digest")
            go_on()

        # The digest of the policy is that of its tensors: a manifest cannot name one policy and hold another.
        if policy_digest(digests) != target.digest:
            raise DigestMismatch(f"policy version {target.version}: the manifest's digest is not that of its tensors")
        return found, num_bytes
