"""Lossless differences between two versions of the same weights: which elements changed, and by how much.

At the learning rates of RL a step moves an fp32 master weight by less than half a unit in the last place of its bf16
copy: 1 to 3 % of the elements change, most of them to a neighbouring number. A patch of one tensor holds:

    gaps   uint32 [C]   distance of every changed element from the one before it, the first one's from 0
    steps  uint   [C]   new bit pattern minus old one, modulo 2^bits, zigzag (0, -1, 1, -2, ... as 0, 1, 2, 3, ...)

both by byte planes (all lowest bytes, then all second ones, ...), so that zstd's Huffman stage sees one distribution at a
time. Bit patterns are compared and patched, so NaNs and -0.0 are preserved; an unchanged tensor has no patch.

Encoding and applying are one pass over the weights in blocks that fit the cache, including the digest of the new tensor.
C = number of changed elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from sluice.common.errors import DigestMismatch
from sluice.common.policies.digest import tensor_bytes, tensor_digest, tensor_hasher

MAX_CHANGED = 0.25
"""With a larger share of changed elements (fp32 weights: nearly all) the delta costs more time than it saves."""
BLOCK_BYTES = 2**19
"""Compared, hashed and patched at a time: fits the second cache level."""
SAMPLE = 4096
"""Elements compared per tensor before anything is encoded."""
_ALIGNMENT = 64
MAX_ELEMENTS = 2**31
"""A policy with a larger tensor is stored in full: positions have 32 bits."""
LEVEL = 1
"""Of zstd: within 0.1 % of full size of level 6, at six times its speed."""

Words = NDArray[Any]
"unsigned, of the elements' size"


def encode(
    tensors: Mapping[str, torch.Tensor], *, base: Mapping[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, torch.Tensor] | None]:
    """Return digests of all tensors, and patches (uint8 [bytes]) of those that differ from `base`.

    Patches are None where full weights are better. All tensors are on the CPU.
    """
    is_alike = tensors.keys() == base.keys() and all(
        (tensor.dtype, tensor.shape) == (base[name].dtype, base[name].shape) and tensor.numel() < MAX_ELEMENTS
        for name, tensor in tensors.items()
    )
    if not is_alike or _sampled_share(tensors, base) > MAX_CHANGED:
        return {name: tensor_digest(tensor) for name, tensor in tensors.items()}, None
    digests, patches = {}, {}
    for name, tensor in tensors.items():
        digests[name], patch = _compare(tensor, base[name])
        if patch is not None:
            patches[name] = patch
    is_smaller = sum(map(len, patches.values())) < sum(tensor.nbytes for tensor in tensors.values())
    return digests, patches if is_smaller else None


def apply(base: torch.Tensor, patches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, str]:
    """Return a new tensor, `base` with the patches applied in order, and its digest, for the caller to check.

    Raises DigestMismatch for bytes that are not a patch of such a tensor.
    """
    words = _words(base)
    size = BLOCK_BYTES // words.itemsize
    starts = np.arange(0, len(words) + size, size, dtype=np.uint32)
    changes = [
        (places, steps, np.searchsorted(places, starts)) for places, steps in (_unpack(p, words) for p in patches)
    ]
    new = _empty_like(words)
    hasher = tensor_hasher(base)
    for i in range(len(starts) - 1):
        block = new[i * size : (i + 1) * size]
        np.copyto(block, words[i * size : (i + 1) * size])
        for places, steps, bounds in changes:
            changed = slice(bounds[i], bounds[i + 1])
            where = places[changed].astype(np.intp) - i * size
            try:
                block[where] = block.take(where) + steps[changed]
            except IndexError:
                raise DigestMismatch("a delta names elements that the tensor does not have") from None
        hasher.update(block.data)
    return torch.from_numpy(new.view(np.uint8)).view(base.dtype).reshape(base.shape), hasher.hexdigest()


def _compare(tensor: torch.Tensor, base: torch.Tensor) -> tuple[str, torch.Tensor | None]:
    """Return the digest of `tensor`, and its patch on `base` if they differ."""
    new, old, hasher = _words(tensor), _words(base), tensor_hasher(tensor)
    size = BLOCK_BYTES // new.itemsize
    mask = np.empty(size, dtype=bool)
    places, steps = [], []
    for start in range(0, len(new), size):
        x, y = old[start : start + size], new[start : start + size]
        where = _differing(x, y, mask)
        hasher.update(y.data)
        if len(where):
            steps.append(y.take(where, mode="clip") - x.take(where, mode="clip"))  # clip: all are inside
            places.append((where + start).astype(np.uint32))
    return hasher.hexdigest(), _pack(np.concatenate(places), np.concatenate(steps)) if places else None


def _differing(x: Words, y: Words, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return where two blocks differ; `mask` is a buffer of at least their length, a multiple of 8.

    Groups of eight first, then within those that differ: where one of a hundred elements differs, `nonzero` mispredicts a
    branch for each; where one of eight does, it works without branches, and only on the groups found.
    """
    np.not_equal(x, y, out=mask[: len(x)])
    mask[len(x) :] = False
    eights = mask.view(np.uint64)
    hits = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights.take(hits, mode="clip").view(bool))
    where = hits.take(within >> 3, mode="clip")
    where <<= 3
    within &= 7
    where |= within
    return where


def _pack(places: NDArray[np.uint32], steps: Words) -> torch.Tensor:
    gaps = np.diff(places, prepend=np.uint32(0))
    sign = steps >> (8 * steps.itemsize - 1)  # wraps like the hardware does: unsigned arithmetic
    raw = np.empty(len(places) * (4 + steps.itemsize), dtype=np.uint8)
    planes = raw.reshape(4 + steps.itemsize, len(places))
    planes[:4] = gaps.view(np.uint8).reshape(-1, 4).T
    planes[4:] = ((steps << 1) ^ (0 - sign)).view(np.uint8).reshape(-1, steps.itemsize).T
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(level=LEVEL).compress(raw.data)), dtype=torch.uint8)


def _unpack(patch: torch.Tensor, words: Words) -> tuple[NDArray[np.uint32], Words]:
    """Return places and steps. Raises DigestMismatch for bytes that `_pack` did not make of such words."""
    try:
        data = patch.numpy().data
        num_bytes = zstandard.get_frame_parameters(data).content_size
        count, rest = divmod(num_bytes, 4 + words.itemsize)
        if rest or count > len(words):  # checked before unpacking: damage must not allocate without bound
            raise DigestMismatch(f"a delta unpacks to {num_bytes} bytes, for {len(words)} elements")
        raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), dtype=np.uint8)
    except (zstandard.ZstdError, TypeError) as error:
        raise DigestMismatch(f"a delta is damaged: {error}") from None
    gaps = _from_planes(raw[: 4 * count], np.dtype(np.uint32))
    zigzag = _from_planes(raw[4 * count :], words.dtype)
    return np.cumsum(gaps, dtype=np.uint32), (zigzag >> 1) ^ (0 - (zigzag & 1))


def _empty_like(words: Words) -> Words:
    """Allocate by numpy, which requests huge pages (torch's memory takes three times as long to fill), aligned as torch does."""
    memory = np.empty(words.nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + words.nbytes].view(words.dtype)


def _words(tensor: torch.Tensor) -> Words:
    """Return the bit patterns of a tensor's elements, flat."""
    return tensor_bytes(tensor).view(f"u{min(tensor.element_size(), 8)}")


def _from_planes(planes: NDArray[np.uint8], dtype: np.dtype[Any]) -> Words:
    rows = planes.reshape(dtype.itemsize, -1)
    words = rows[0].astype(dtype)
    for i, row in enumerate(rows[1:], start=1):
        if row.any():  # the high bytes are nearly always zero
            words |= row.astype(dtype) << (8 * i)
    return words


def _sampled_share(tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> float:
    """Estimate the share of changed elements from the middle SAMPLE elements of every tensor."""
    changed, total = 0.0, sum(tensor.numel() for tensor in tensors.values())
    for name, tensor in tensors.items():
        new, old = _words(tensor), _words(base[name])
        middle = slice(max(0, len(new) - SAMPLE) // 2, (len(new) + SAMPLE) // 2)
        if len(new):
            changed += len(new) / total * float(np.mean(new[middle] != old[middle]))
    return changed
