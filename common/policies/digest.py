"""Digests of weights: xxh3-128 of a tensor's dtype, shape and bytes; sha256 over those of a policy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray


def tensor_hasher(tensor: torch.Tensor) -> xxhash.xxh3_128:
    """Return a hasher of dtype and shape; the caller adds the tensor's bytes, in any number of pieces."""
    return xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the xxh3-128 of dtype, shape and bytes."""
    hasher = tensor_hasher(tensor)
    hasher.update(tensor_bytes(tensor).data)
    return hasher.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor on the CPU; of a contiguous one, without a copy."""
    if not tensor.numel():  # may have a stride of 0, which cannot be viewed
        return np.empty(0, dtype=np.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest that a manifest of these tensors would name."""
    return policy_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def policy_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a policy, from those of its tensors."""
    return hashlib.sha256("".join(f"{name}={digests[name]};" for name in sorted(digests)).encode()).hexdigest()
