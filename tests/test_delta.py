"""Deltas give back every bit of the new weights, are small where little changed, and say so where they are no use."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from builders import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.common.errors import DigestMismatch
from sluice.common.policies import delta
from sluice.common.policies.digest import tensor_bytes, tensor_digest

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]


def of_bits(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor with these bytes."""
    tensor = torch.empty(values.nbytes, dtype=torch.uint8)
    tensor.numpy()[:] = values.view(np.uint8).reshape(-1)
    return tensor.view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor_bytes(tensor).tobytes()


def assert_patched(base: torch.Tensor, new: torch.Tensor) -> torch.Tensor | None:
    """Encoding and applying gives the new tensor bit by bit, and its digest on both sides; returns the patch."""
    digest, patch = delta._compare(new, base)
    before = bits(base)
    found, found_digest = delta.apply(base, [] if patch is None else [patch])
    assert (found.dtype, found.shape) == (new.dtype, new.shape)
    assert bits(found) == bits(new)
    assert bits(base) == before
    assert delta.apply(found, [])[1] == found_digest, "what came out of one delta is the base of the next"
    assert digest == found_digest == tensor_digest(new)
    return patch


def adam(num_steps: int, *, dtype: torch.dtype, size: int = 2**17) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in `dtype` before and after one step of Adam at lr 1e-6 with warm moments, taken in fp32.

    Written out: the first use of torch.optim imports for seconds.
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.empty(size).normal_(std=0.02, generator=generator)
    mean, square = torch.zeros(size), torch.zeros(size)
    for step in range(1, num_steps + 1):
        before = weight.to(dtype, copy=True)
        gradient = torch.empty(size).normal_(generator=generator)
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient**2, 0.05)
        weight -= 1e-6 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    return before, weight.to(dtype)


# Bit by bit


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_bits_changed_anywhere_come_back(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    size = data.draw(st.integers(0, 70))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = 2 if dtype == torch.bool else 256
    base = random.integers(0, top, (size, dtype.itemsize), dtype=np.uint8)
    new = base.copy()
    changed = data.draw(st.lists(st.integers(0, size - 1), max_size=size) if size else st.just([]))
    new[changed] = random.integers(0, top, (len(changed), dtype.itemsize), dtype=np.uint8)
    assert_patched(of_bits(base, dtype), of_bits(new, dtype))


@for_each("dtype", [torch.bfloat16, torch.float32])
def test_changes_at_block_edges_and_far_apart_come_back(dtype):
    block = delta.BLOCK_BYTES // dtype.itemsize
    base = torch.zeros(2 * block + 3, dtype=dtype)
    for places in ([0], [len(base) - 1], [0, len(base) - 1], [block - 1, block, 2 * block - 1, 2 * block]):
        new = base.clone()
        new[places] = 1.5
        patch = assert_patched(base, new)
        assert patch is not None and len(patch) < 100


def test_not_a_number_and_negative_zero_are_bits_like_others():
    base = of_bits(np.array([0x7FC0, 0x7FC0, 0x0000, 0x8000, 0x7F80], np.uint16), torch.bfloat16)
    new = of_bits(np.array([0x7FC0, 0xFFC1, 0x8000, 0x8000, 0xFF80], np.uint16), torch.bfloat16)
    assert assert_patched(base, new) is not None
    assert delta._compare(base, base)[1] is None, "the same NaN is no change"


def test_scalars_empty_tensors_views_and_all_elements_come_back():
    assert_patched(torch.tensor(1.0), torch.tensor(2.0))
    assert assert_patched(torch.zeros(0, 4), torch.zeros(0, 4)) is None
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert_patched(base.T, (base + torch.eye(3, 4)).T)
    numbers = torch.arange(5000, dtype=torch.int64)
    assert_patched(numbers, numbers - 2**62)
    assert assert_patched(numbers, numbers.clone()) is None


def test_patches_of_several_versions_are_applied_in_one_pass():
    versions = [torch.zeros(1000, dtype=torch.bfloat16)]
    for i in range(5):
        versions.append(versions[-1].clone())
        versions[-1][i * 7 :: 50] += 1
    patches = [delta._compare(new, old)[1] for old, new in pairwise(versions)]
    found, digest = delta.apply(versions[0], patches)
    assert bits(found) == bits(versions[-1]) and digest == tensor_digest(versions[-1])


# When


def test_bf16_weights_after_a_step_of_adam_take_a_hundredth_of_their_size_and_fp32_ones_travel_in_full():
    before, after = adam(15, dtype=torch.bfloat16)
    digests, patches = delta.encode({"w": after}, base={"w": before})
    assert digests == {"w": tensor_digest(after)}
    assert patches is not None and len(patches["w"]) < 0.01 * after.nbytes
    assert bits(delta.apply(before, [patches["w"]])[0]) == bits(after)
    before, after = adam(2, dtype=torch.float32, size=2**12)
    assert delta.encode({"w": after}, base={"w": before}) == ({"w": tensor_digest(after)}, None)


def test_tensors_that_did_not_change_have_no_patch():
    base = {"a": torch.zeros(1000), "b": torch.zeros(10000)}
    new = {"a": base["a"].clone().index_fill_(0, torch.tensor([500]), 1), "b": base["b"].clone()}
    _, patches = delta.encode(new, base=base)
    assert patches is not None and patches.keys() == {"a"}
    assert delta.encode(base, base=base)[1] == {}


@for_each(
    ("new", "base"),
    [
        (torch.zeros(4, 2), {"w": torch.zeros(4)}),
        (torch.zeros(4, 2), {"w": torch.zeros(4, 2).half()}),
        (torch.zeros(4, 2), {"v": torch.zeros(4, 2)}),
        (torch.zeros(4, 2), {}),
        (torch.tensor([0, 1, 0, 0], dtype=torch.int8), {"w": torch.zeros(4, dtype=torch.int8)}),
    ],
)
def test_other_names_types_and_shapes_and_what_would_not_be_smaller_travel_in_full(new, base):
    assert delta.encode({"w": new}, base=base) == ({"w": tensor_digest(new)}, None)


# Damage


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 10**6), is_cut=st.booleans())
def test_a_damaged_patch_never_passes_for_the_weights(place, bit, cut, is_cut):
    base = torch.zeros(5000, dtype=torch.bfloat16)
    new = base.clone()
    new[torch.arange(0, 5000, 37)] = torch.arange(136, dtype=torch.bfloat16) + 1
    digest, patch = delta._compare(new, base)
    damaged = patch.clone()
    damaged[place % len(patch)] ^= 1 << bit
    if is_cut:
        damaged = patch[: cut % len(patch)].clone()
    try:
        found, found_digest = delta.apply(base, [damaged])
    except DigestMismatch:
        return
    assert found_digest == tensor_digest(found)
    assert (found_digest == digest) == (bits(found) == bits(new))


def test_a_patch_that_unpacks_to_more_than_its_tensor_is_refused_unread():
    bomb = bytearray(zstandard.ZstdCompressor().compress(bytes(6 * 10**6)))
    with pytest.raises(DigestMismatch, match="unpacks to 6000000 bytes, for 1000 elements"):
        delta.apply(torch.zeros(1000, dtype=torch.bfloat16), [torch.frombuffer(bomb, dtype=torch.uint8)])
