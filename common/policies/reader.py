"""Policy versions as their readers see them: `served()`, `fetch(version)`.

    manifest -> verify its signature (`common/policies/signing.py`) -> tensors -> verify every digest; what cannot be verified is
    never served

A process that fetched a recent version applies the deltas since; any other starts at the nearest full version. A reader that
cannot verify a version requests it in full, and the trainer republishes it: a damaged delta delays that version, it does not
break the chain.

Digests are those of the result: xxh3-128 per tensor; the manifest's own digest is the sha256 of all of them. `fetch` computes
both from the bytes in memory, so a worker that reports a manifest's digest has verified it.

Memory: a reader holds the version that it fetched last, unless that is fp32 and was stored in full (as the next one will be).
Unchanged tensors are shared between versions, so nothing may be written to them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.connections.secrets import secret
from sluice.common.errors import DigestMismatch, PolicyError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies import delta
from sluice.common.policies.digest import policy_digest
from sluice.common.policies.lineage import read_pointer
from sluice.common.policies.manifest import Manifest, ManifestChain, Policy
from sluice.common.policies.retention import Retention
from sluice.common.policies.signing import RUN_KEY, Signer
from sluice.common.policies.transports import Loaded, open_transport
from sluice.common.run import RunRecord

log = logging.getLogger("sluice.policy_store")


class PolicyReader:
    """Retrieval of policy versions, over either transport."""

    def __init__(
        self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, *, signer: Signer | None = None
    ) -> None:
        """Open the store. signer: by default with the key of the environment, if there is one."""
        self._client, self._keys = client, keys
        self._full_every = config.full_every if config.delta else 1
        signer = signer or Signer(keys.run, secret(RUN_KEY))
        self._signer = signer.of_run(RunRecord(client, keys).created_at)
        self._chain = ManifestChain(client, keys, self._signer)
        self._transport = open_transport(client, keys, config)
        self._retention = Retention(client, keys, chain=self._chain, transport=self._transport, keep=config.keep)
        self._scripts = Scripts(client, keys)
        self._held: Policy | None = None
        "the version that the next one may be a delta on"
        self.last_fetch_s = 0.0
        self.last_fetch_bytes = 0

    def latest_version(self) -> int:
        """Return the version that the pointer names; -1 before the first publication."""
        return self.served()[0]

    def served(self) -> tuple[int, str]:
        """Return version and digest that the pointer names; (-1, "") before the first publication. Raises PolicyError."""
        pointer = read_pointer(self._client, self._keys)
        if "unreadable" in pointer:
            raise PolicyError(f"the policy pointer cannot be read: {pointer['unreadable']}")
        return int(pointer.get("version", -1)), pointer.get("digest", "")

    def check_confirmed(self, version: int, digest: str) -> None:
        """Check that the trainer has confirmed this pointer a moment ago, where the run has a key. Raises SignatureRefused."""
        confirmation = self._client.hget(self._keys.policy, "confirmed") or b""
        self._signer.check_confirmed(version, digest, confirmation, now_s=self._client.time()[0])

    def manifest(self, version: int) -> Manifest:
        """Read a manifest. Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        return self._chain.read(version)

    def fetch(self, version: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Return verified, read-only tensors of a version. Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        began = time.monotonic()
        # The reader is registered before it reads the manifest, so that what that names cannot be collected meanwhile.
        with self._retention.reading(version) as renew:
            manifest = self.manifest(version)
            held = self._held if self._held and self._held.manifest.version < version else None
            try:
                tensors, num_bytes = self._load_somehow(manifest, held=held, renew=renew)
            except PolicyError:
                self._scripts("write_record", "SET", self._keys.full_requested, version)
                raise
        # Held only where the next version may be a delta.
        has_deltas = manifest.base >= 0 or any(tensor.dtype != torch.float32 for tensor in tensors.values())
        self._held = Policy(manifest=manifest, tensors=tensors) if has_deltas and self._full_every > 1 else None
        self.last_fetch_s, self.last_fetch_bytes = time.monotonic() - began, num_bytes
        return manifest, tensors

    def _load_somehow(self, target: Manifest, *, held: Policy | None, renew: Callable[[], None]) -> Loaded:
        """Load by the deltas since the held version; failing that, from full weights."""
        if held is not None and target.base >= 0:
            try:
                return self._load(target, held=held, renew=renew)
            except PolicyError as error:
                log.warning("no chain from version %d, reading full weights: %s", held.manifest.version, error)
        return self._load(target, held=None, renew=renew)

    def _load(self, target: Manifest, *, held: Policy | None, renew: Callable[[], None]) -> Loaded:
        """Return verified tensors, and the number of bytes read."""
        # Read what the version consists of: full weights, unless a version is held, and the patches of every version since.
        first, *deltas = self._chain.path(target, start=held.manifest if held else None)
        base, num_bytes = (held.tensors, 0) if held else self._transport.read(first.version, renew=renew)
        patches: dict[str, list[torch.Tensor]] = {name: [] for name in base}
        for manifest in deltas:
            tensors, size = self._transport.read(manifest.version, "delta", renew=renew)
            num_bytes += size
            for name, patch in tensors.items():
                patches.setdefault(name, []).append(patch)
        if patches.keys() != target.tensors.keys() or patches.keys() != base.keys():
            raise DigestMismatch(f"policy version {target.version} holds other tensors than its manifest names")

        # Every tensor has the digest that the manifest names, computed from the memory that is served: tensors are copied while
        # they are verified, since a mapped file's pages may be lost while an engine serves them. A held tensor was verified.
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
            renew()

        # The digest of the policy is that of its tensors: a manifest cannot name one policy and hold another.
        if policy_digest(digests) != target.digest:
            raise DigestMismatch(f"policy version {target.version}: the manifest's digest is not that of its tensors")
        return found, num_bytes
