"""Versioned weights, as the trainer publishes them: `announce(...)`, `publish(...)`.

    write weights or delta -> manifest (digest per tensor) -> move the pointer (one script) -> event

Versions only grow. The manifest names (version, trainer step, incarnation, parent); the pointer lives in Redis, so all
roles agree on it whichever transport carries the bytes (`transports.py`). Readers: `reader.py`; the chain of deltas:
`manifest.py`; which versions stay: `retention.py`.

Whole is the first version that a trainer process publishes, every `policy_store.full_every`th, and each one that differs
too much from the version before.

Memory: the newest version is held, and while the next one is made, that too: two copies of the model in the published
precision. Nothing may be written to tensors that were published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import redis
import torch

from sluice.common.config import PolicyStoreConfig
from sluice.common.errors import DigestMismatch, PolicyError
from sluice.common.keys import Keys
from sluice.common.policies import delta
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.digest import policy_digest, tensor_digest, weights_digest
from sluice.common.policies.manifest import Manifest, Policy
from sluice.common.policies.reader import PolicyReader
from sluice.common.policies.signing import Signer


class PolicyStore(PolicyReader):
    """Publication and retrieval of policy versions, over either transport."""

    def __init__(
        self, client: redis.Redis, keys: Keys, config: PolicyStoreConfig, *, signer: Signer | None = None
    ) -> None:
        """signer: by default with the key of the environment, if there is one."""
        super().__init__(client, keys, config, signer=signer)
        self._announced: dict[int, str] = {}
        self._republished = -1

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
        """Make a version the one to serve. `tensors` are on the CPU and never change from now on: they are held as a base.

        Raises PolicyError when a version as new is already served: versions only grow.
        """
        # A delta needs a base that every reader can come to: the version published before, while its manifest still names it.
        base, num_links = self._base_for(version) if adapter_scale is None else (None, 0)
        if base is None:
            digests, patches = {name: tensor_digest(tensor) for name, tensor in tensors.items()}, None
        else:
            digests, patches = delta.encode(tensors, base=base.tensors)

        # Asked before anything is written, so that a trainer that was replaced cannot damage a version that is served.
        self._refuse_outdated(version, policy_digest(digests), incarnation=incarnation)
        self._retention.sweep(before=version)

        # Tensors, then manifest, then pointer: a process that dies in between leaves the version before it served.
        is_full = patches is None or num_links >= self._full_every
        manifest = Manifest(
            version=version,
            step=step,
            incarnation=incarnation,
            parent=parent,
            num_bytes=self._transport.write(version, tensors) if is_full else 0,
            digest=policy_digest(digests),
            tensors=digests,
            canary=[sequence.to_wire() for sequence in canary],
            base=base.manifest.version if base is not None and patches is not None else -1,
            delta_bytes=0 if patches is None else self._transport.write(version, patches, "delta"),
            adapter_scale=adapter_scale,
        )
        self._chain.record(manifest)
        num_bytes = manifest.num_bytes + manifest.delta_bytes
        moved = self._scripts("publish", version, parent, step, incarnation, manifest.digest, num_bytes)
        if moved != 1:
            self._refuse_outdated(version, manifest.digest, incarnation=incarnation)
        if self._full_every > 1:
            self._held = Policy(manifest=manifest, tensors=tensors)
        self._retention.collect_garbage()
        return manifest

    def _base_for(self, version: int) -> tuple[Policy | None, int]:
        """What this version can be a delta upon, and the versions that one consists of; (None, 0) = nothing."""
        held = self._held
        if held is None or held.manifest.version >= version:
            return None, 0
        try:
            if self.manifest(held.manifest.version).digest != held.manifest.digest:
                return None, 0
        except PolicyError:  # a Redis that lost it has lost all that would have been built on it; or it was replaced
            return None, 0
        return held, 1 + len(self._chain.base_chain(held.manifest.version))

    def is_full_requested(self) -> bool:
        """Whether a reader could not verify the version that this process published last; each version is mended once."""
        if self._held is None or self._held.manifest.version == self._republished:
            return False
        return self._client.get(self._keys("full_requested")) == b"%d" % self._held.manifest.version

    def republish_full(self) -> None:
        """Write the version that this process published last whole, beside any delta of it. Raises DiskFull."""
        assert self._held is not None
        manifest, tensors = self._held.manifest, self._held.tensors
        manifest = replace(manifest, num_bytes=self._transport.write(manifest.version, tensors))
        self._chain.record(manifest)
        self._held = Policy(manifest=manifest, tensors=tensors)
        self._republished = manifest.version

    def _refuse_outdated(self, version: int, digest: str, *, incarnation: int) -> None:
        """Raise PolicyError where a newer trainer has taken over, or a version as new is served."""
        newest = int(self._client.hget(self._keys("run"), "incarnation") or 0)
        if incarnation < newest:
            raise PolicyError("a newer trainer process has taken this run over; this one must stop")
        served = self.latest_version()
        is_same = served == version and self._client.hget(self._keys("policy"), "digest") == digest.encode()
        if served >= version and not is_same:
            raise PolicyError(f"policy version {version} was not published: version {served} is served already")

    def announce(self, version: int, *, step: int, parent: int) -> None:
        """Enter a version into the lineage before its bytes are written, so that ages can be told while they travel."""
        self._announced[version] = f"{parent}:{step}"
        self._scripts("write_record", "HSET", "lineage", version, self._announced[version])

    def announce_again(self, *, incarnation: int) -> None:
        """Restore what this process announced, and its incarnation, in a Redis that has forgotten some of it."""
        for version, entry in self._announced.items():
            self._client.hsetnx(self._keys("lineage"), str(version), entry)
        if int(self._client.hget(self._keys("run"), "incarnation") or 0) < incarnation:
            self._client.hset(self._keys("run"), "incarnation", incarnation)

    def restore(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the bytes of a version published whole again where they were lost. Raises DigestMismatch for other bytes."""
        manifest = self.manifest(version)
        assert manifest.num_bytes, f"policy version {version} is a delta"
        try:
            with self._retention.reading(version) as go_on:
                self._load(manifest, held=None, go_on=go_on)
        except PolicyError:
            if weights_digest(tensors) != manifest.digest:
                text = f"policy version {version} is lost, and these weights are not it: was model.path changed?"
                raise DigestMismatch(text) from None
            self._transport.write(version, tensors)
