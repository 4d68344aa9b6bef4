"""Versioned weights, as the trainer publishes them: `announce(...)`, `publish(...)`.

    write weights or delta -> manifest (digest per tensor) -> move the pointer (one script) -> event

Versions only grow. The manifest names (version, trainer step, incarnation, parent); the pointer lives in Redis, so all
roles agree on it whichever transport carries the bytes (`transports.py`). Readers: `reader.py`; the chain of deltas:
`manifest.py`; which versions stay: `retention.py`.

Stored in full are the first version that a trainer process publishes, every `policy_store.full_every`th, and each one that
differs too much from the version before.

Memory: the newest version is held, and the next one while it is made: two copies of the model in the published precision.
Published tensors may not be written to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.errors import DigestMismatch, PolicyError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies import delta
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.digest import policy_digest, tensor_digest, weights_digest
from sluice.common.policies.manifest import Manifest, Policy
from sluice.common.policies.reader import PolicyReader
from sluice.common.policies.signing import CONFIRM_S, Signer
from sluice.common.run import RunRecord


class PolicyStore(PolicyReader):
    """Publication and retrieval of policy versions, over either transport."""

    def __init__(
        self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, *, signer: Signer | None = None
    ) -> None:
        super().__init__(client, keys, config, signer=signer)
        self._announced: dict[int, str] = {}
        self._republished = -1
        self._served: tuple[int, str] | None = None
        "version and digest that this process has published last"
        self._confirmed_at = -math.inf

    def publish(
        self,
        version: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        step: int,
        parent: int,
        incarnation: int = 1,
        canary: Sequence[CanarySequence] = (),
        adapter_scale: float | None = None,
    ) -> Manifest:
        """Publish a version. `tensors` are on the CPU and must not change afterwards: they are held as a base.

        Raises PolicyError when this or a newer version is already served: versions only grow.
        """
        # A delta needs a base that every reader can reach: the version published before, while its manifest still names it.
        base, num_links = self._base_for(version) if adapter_scale is None else (None, 0)
        if base is None:
            digests, patches = {name: tensor_digest(tensor) for name, tensor in tensors.items()}, None
        else:
            digests, patches = delta.encode(tensors, base=base.tensors)

        # Checked before anything is written, so that a trainer that was replaced cannot damage a version that is served.
        self._refuse_outdated(version, policy_digest(digests), incarnation=incarnation)
        self._retention.sweep(before=version)

        # Tensors, then manifest, then pointer: a process that dies in between leaves the version before it served.
        is_full = patches is None or num_links >= self._full_every
        manifest = Manifest(
            version=version,
            step=step,
            incarnation=incarnation,
            parent=parent,
            run_created_us=self._signer.created_us or 0,
            num_bytes=self._transport.write(version, tensors) if is_full else 0,
            digest=policy_digest(digests),
            tensors=digests,
            canary=[asdict(sequence) for sequence in canary],
            base=base.manifest.version if base is not None and patches is not None else -1,
            delta_bytes=0 if patches is None else self._transport.write(version, patches, "delta"),
            adapter_scale=adapter_scale,
        )
        self._chain.record(manifest)
        num_bytes = manifest.num_bytes + manifest.delta_bytes
        moved = self._scripts("publish", version, parent, step, incarnation, manifest.digest, num_bytes)
        if moved != 1:
            self._refuse_outdated(version, manifest.digest, incarnation=incarnation)
        self._served, self._confirmed_at = (version, manifest.digest), -math.inf
        self.confirm(self._client)
        if self._full_every > 1:
            self._held = Policy(manifest=manifest, tensors=tensors)
        self._retention.collect_garbage()
        return manifest

    def confirm(self, client: redis.Redis) -> None:
        """Confirm what this process has published last, for workers that start; due again every CONFIRM_S."""
        now = time.monotonic()
        if self._served is None or now - self._confirmed_at < CONFIRM_S:
            return
        version, digest = self._served
        if confirmation := self._signer.confirm(version, digest, now_s=client.time()[0]):
            Scripts(client, self._keys)("write_record", "HSET", self._keys.policy, "confirmed", confirmation)
        self._confirmed_at = now

    def _base_for(self, version: int) -> tuple[Policy | None, int]:
        """Return the base for a delta of this version, and the length of its chain; (None, 0) = there is none."""
        held = self._held
        if held is None or held.manifest.version >= version:
            return None, 0
        try:
            if self.manifest(held.manifest.version).digest != held.manifest.digest:
                return None, 0
        except PolicyError:  # Redis has lost it, or this trainer was replaced: readers cannot reach it
            return None, 0
        return held, 1 + len(self._chain.base_chain(held.manifest.version))

    def is_full_requested(self) -> bool:
        """Return whether a reader could not verify the last version of this process; each is republished once."""
        if self._held is None or self._held.manifest.version == self._republished:
            return False
        return self._client.get(self._keys.full_requested) == b"%d" % self._held.manifest.version

    def pop_base_request(self) -> bool:
        """Return whether a reader could not verify version 0; it asks again as long as it cannot."""
        is_requested = self._client.get(self._keys.full_requested) == b"0"
        if is_requested:
            self._client.delete(self._keys.full_requested)
        return is_requested

    def republish_full(self) -> None:
        """Write the last version of this process in full, beside any delta of it. Raises DiskFull."""
        assert self._held is not None
        manifest, tensors = self._held.manifest, self._held.tensors
        manifest = replace(manifest, num_bytes=self._transport.write(manifest.version, tensors))
        self._chain.record(manifest)
        self._held = Policy(manifest=manifest, tensors=tensors)
        self._republished = manifest.version

    def _refuse_outdated(self, version: int, digest: str, *, incarnation: int) -> None:
        """Raise PolicyError where a newer trainer owns the run, or this or a newer version is served."""
        if incarnation < RunRecord(self._client, self._keys).incarnation:
            raise PolicyError("a newer trainer process owns this run; this one must stop")
        served, served_digest = self.served()
        if served > version or (served == version and served_digest != digest):
            raise PolicyError(f"policy version {version} was not published: version {served} is served already")

    def announce(self, version: int, *, step: int, parent: int) -> None:
        """Add a version to the lineage before its bytes are written, so that ages are known meanwhile."""
        self._announced[version] = f"{parent}:{step}"
        self._scripts("write_record", "HSET", self._keys.lineage, version, self._announced[version])

    def forget(self, versions: Collection[int]) -> None:
        """Remove versions from the lineage: what was sampled from them counts as too old from then on."""
        for version in versions:
            self._announced.pop(version, None)
        if versions:
            self._client.hdel(self._keys.lineage, *map(str, versions))

    def announce_again(self, *, incarnation: int) -> None:
        """Restore what this process announced, and its incarnation, in a Redis that has lost some of it."""
        for version, entry in self._announced.items():
            self._client.hsetnx(self._keys.lineage, str(version), entry)
        RunRecord(self._client, self._keys).restore_incarnation(incarnation)

    def restore(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a version again, in full, if its bytes were lost. Raises DigestMismatch for other bytes, PolicyError."""
        manifest = self.manifest(version)
        try:
            with self._retention.reading(version) as renew:
                self._load(manifest, held=None, renew=renew)
        except PolicyError:
            if weights_digest(tensors) != manifest.digest:
                text = f"policy version {version} is lost, and these weights are not it: was model.path changed?"
                raise DigestMismatch(text) from None
            num_bytes = self._transport.write(version, tensors)
            if not manifest.num_bytes:  # it was a delta
                self._chain.record(replace(manifest, num_bytes=num_bytes))
