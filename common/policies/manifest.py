"""What is known of one policy version: its manifest, as Redis holds it, and the version in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sluice.common.errors import DigestMismatch, SerializationError
from sluice.common.policies.signing import Signer
from sluice.common.serialization import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What one policy version is."""

    version: int
    step: int
    "trainer step that made it; 0 is the base model"
    incarnation: int
    "of the trainer process, growing by one with each start"
    parent: int
    "version it was trained from; -1 for the base model"
    num_bytes: int
    "of the whole weights as stored; 0 = there is a delta only"
    digest: str
    "sha256 over names and digests of all tensors"
    tensors: dict[str, str]
    "name -> xxh3-128"
    canary: list[dict[str, Any]] = field(default_factory=list)
    "CanarySequence each: what a sampler that serves this version must reproduce"
    base: int = -1
    "version that the delta applies to; -1 = there are whole weights only"
    delta_bytes: int = 0
    "of the delta as stored"
    adapter_scale: float | None = None
    "of a LoRA adapter upon version 0, which the tensors then are (`common/models/lora.py`)"

    @classmethod
    def from_signed_bytes(cls, signed: bytes, signer: Signer, *, version: int) -> Manifest:
        """The manifest of a version from what Redis holds under its number. Raises SignatureRefused, DigestMismatch."""
        try:
            manifest = cls(**decode(signer.verify(signed, version=version)))
        except (SerializationError, TypeError) as error:
            raise DigestMismatch(f"the manifest of policy version {version} is damaged: {error}") from None
        if manifest.version != version:
            raise DigestMismatch(f"the manifest of policy version {version} is that of version {manifest.version}")
        return manifest

    def to_signed_bytes(self, signer: Signer) -> bytes:
        """For Redis."""
        return signer.sign(encode(asdict(self)))

    @property
    def base_version(self) -> int:
        """The version without which this one cannot be read; -1 = it is stored whole."""
        return -1 if self.num_bytes else self.base

    @property
    def payload_bytes(self) -> int:
        """What a reader downloads who has the version before."""
        return self.num_bytes if self.base < 0 else self.delta_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A verified version in memory."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
