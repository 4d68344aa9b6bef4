"""Manifests of policy versions in Redis, and the chain that they form.

    v0 full <- v1 <- v2 ... <- v15 <- v16 delta and full <- v17 ...        policy_store.full_every = 16

A version is stored in full, as a delta (`common/policies/delta.py`) on the version published before it, its *base*, or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import redis
import torch
from pydantic import ConfigDict, Field, StrictInt, StrictStr, TypeAdapter, ValidationError, with_config

from sluice.common.errors import DigestMismatch, PolicyError, PolicyNotFound, SerializationError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.policies.canary import CanarySequence
from sluice.common.policies.lineage import read_versions
from sluice.common.policies.signing import Signer
from sluice.common.serialization import decode, encode

_Count = Annotated[int, Field(strict=True, ge=0)]
_Scale = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The description of one policy version."""

    version: _Count
    step: _Count
    "trainer step that made it; 0 is the base model"
    incarnation: StrictInt
    "of the trainer process, growing by one with each start"
    parent: StrictInt
    "version it was trained from; -1 for the base model"
    num_bytes: _Count
    "of the full weights as stored; 0 = there is a delta only"
    digest: StrictStr
    "sha256 over names and digests of all tensors"
    tensors: dict[StrictStr, StrictStr]
    "name -> xxh3-128"
    canary: list[dict[str, Any]] = field(default_factory=list)
    "CanarySequence each: what a sampler that serves this version must reproduce"
    base: StrictInt = -1
    "version that the delta applies to; -1 = there are full weights only"
    delta_bytes: _Count = 0
    "of the delta as stored"
    run_created_us: _Count = 0
    "microseconds since the epoch: tells the run from another one of its name"
    adapter_scale: _Scale | None = None
    "of a LoRA adapter on version 0, which the tensors then are (`common/models/lora.py`)"

    @classmethod
    def from_signed_bytes(cls, signed: bytes, signer: Signer, *, version: int) -> Manifest:
        """Decode the manifest that Redis holds under a version. Raises SignatureRefused, DigestMismatch."""
        try:
            manifest = _MANIFEST.validate_python(decode(signer.verify(signed, version=version)))
            for wire in manifest.canary:
                CanarySequence.from_wire(wire)
        except ValidationError as error:
            reason = "; ".join(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in error.errors()[:3])
            raise DigestMismatch(f"the manifest of policy version {version} is damaged: {reason}") from None
        except SerializationError as error:
            raise DigestMismatch(f"the manifest of policy version {version} is damaged: {error}") from None
        signer.check_run(manifest.run_created_us, version=version)
        if manifest.version != version:
            raise DigestMismatch(f"the manifest of policy version {version} is that of version {manifest.version}")
        if max(manifest.base, manifest.parent) >= version:  # every chain ends: versions only grow
            raise DigestMismatch(
                f"the manifest of policy version {version} names base {manifest.base} and parent {manifest.parent}, which "
                "are not older"
            )
        return manifest

    def to_signed_bytes(self, signer: Signer) -> bytes:
        """Encode and sign for Redis."""
        return signer.sign(encode(asdict(self)))

    @property
    def base_version(self) -> int:
        """The version without which this one cannot be read; -1 = it is stored in full."""
        return -1 if self.num_bytes else self.base

    @property
    def payload_bytes(self) -> int:
        """Bytes that a reader downloads that holds the previous version."""
        return self.num_bytes if self.base < 0 else self.delta_bytes


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A verified version in memory."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]


class ManifestChain:
    """The manifests of one run in Redis."""

    def __init__(self, client: redis.Redis, keys: Keys, signer: Signer) -> None:
        self._client, self._keys, self._signer = client, keys, signer
        self._scripts = Scripts(client, keys)
        self._known_bases: dict[int, int] = {}

    def read(self, version: int) -> Manifest:
        """Read a manifest. Raises PolicyNotFound, SignatureRefused, DigestMismatch."""
        signed = self._client.hget(self._keys.manifests, str(version))
        if signed is None:
            raise PolicyNotFound(f"policy version {version} was never published in this run, or was removed")
        return Manifest.from_signed_bytes(signed, self._signer, version=version)

    def record(self, manifest: Manifest) -> None:
        """Write the manifest of a version whose tensors are written, also while Redis is full."""
        self._scripts(
            "write_record", "HSET", self._keys.manifests, manifest.version, manifest.to_signed_bytes(self._signer)
        )
        self._known_bases[manifest.version] = manifest.base_version

    def remove(self, version: int) -> None:
        self._client.hdel(self._keys.manifests, str(version))
        self._known_bases.pop(version, None)

    def versions(self) -> list[int]:
        """Return the versions that have a manifest, ascending."""
        return sorted(read_versions(self._client.hkeys(self._keys.manifests), where=self._keys.manifests))

    def base_chain(self, version: int) -> list[int]:
        """Return the versions that this one depends on, down to a full one."""
        found: list[int] = []
        while True:
            if version not in self._known_bases:
                try:
                    self._known_bases[version] = self.read(version).base_version
                except PolicyError:
                    return found
            version = self._known_bases[version]
            if version < 0:
                return found
            found.append(version)

    def path(self, target: Manifest, *, start: Manifest | None) -> list[Manifest]:
        """Return the manifests from `start` (none = nearest full version) to `target`, both included. Raises PolicyNotFound."""
        path = [target]
        while path[-1].num_bytes == 0 if start is None else path[-1].version > start.version:
            if path[-1].base < 0:
                raise PolicyNotFound(f"policy version {path[-1].version} is stored in full, not as a delta")
            path.append(self.read(path[-1].base))
        if start is not None and path[-1].digest != start.digest:
            raise PolicyNotFound(
                f"the chain of policy version {target.version} does not lead to version {start.version}"
            )
        return path[::-1]
