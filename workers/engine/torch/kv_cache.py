"""The keys and values of all running sequences, one slot per row and position.

Legend: R = rows allocated, C = positions allocated, n = rows active (always the first n), S = positions attended,
H = key-value heads, D = head size (keys and values may differ in it), G = prompts, P = tokens prefilled.

Invariants:
* tensors are [R, H, C, D]: what a head attends to is contiguous (up to 1.5x faster than a token's heads side by side);
* R * C never exceeds `max_positions`. Within it they grow by steps, layer by layer, when a longer row or more rows come;
  one shrinks only where the other would not fit otherwise;
* a slot is written before it is attended to: masks come from lengths.
"""

from __future__ import annotations

import inspect
import math
import mmap
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

POSITION_STEP = 16
"Attended positions are rounded up to this: few distinct shapes, and masks aligned as CUDA kernels need them."
_GROWTH = 1.5
_SMALLEST_SPAN = 64
"Fewest positions copied: few distinct spans where all rows are short."


def cache_argument(model: torch.nn.Module) -> str:
    """Return the name of the argument by which a model takes its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def round_up(length: int, step: int = POSITION_STEP) -> int:
    """Return the smallest multiple of `step` that is at least `length`."""
    return -(-length // step) * step


@torch.no_grad()
def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values of one token in all layers, measured in a forward pass of one token."""
    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.base_model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True)
    return sum(states.nbytes for layer in cache.layers for states in _states(layer))


class SlotCache(Cache):
    """A transformers cache whose rows differ in length. For decoding only: prefill runs on a DynamicCache, see `fill`.

    max_positions: bound on R * C; none = as many as max_rows rows of max_length take.
    """

    def __init__(
        self, *, max_rows: int, max_length: int, device: torch.device, max_positions: int | None = None
    ) -> None:
        super().__init__(layers=[])
        self._device = device
        self._max_rows = max_rows
        self._max_length = round_up(max_length)
        self._max_positions = max_positions
        self._rows = 0
        self._length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._active = slice(0, 0)
        self._span = 0
        self._positions = torch.empty(0, dtype=torch.long)
        self._slots: dict[int, Tensor] = {}

    def has_room(self, *, rows: int, length: int) -> bool:
        """Return whether `rows` rows of `length` positions are allocated."""
        return rows <= self._rows and length <= self._length

    def reserve(self, *, rows: int, length: int, held: Sequence[int]) -> None:
        """Make room for `rows` rows of `length` positions, where it `has_room` not yet; row r keeps its first held[r]."""
        self._rows, self._length = self._shape(rows, round_up(length))
        chunks = _by_span(held, device=self._device)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = new = self._allocate(old)
                for kept, span in chunks:
                    span = min(span, old.shape[2], self._length)
                    new[kept, :, :span] = old[kept, :, :span]

    def fill(self, prefilled: DynamicCache, *, first_row: int, source: Tensor, held: Sequence[int]) -> None:
        """Copy prefilled [G, H, P, D]: row first_row + i takes the first held[i] positions of prompt source[i]."""
        chunks = [(first_row + index, source[index], span) for index, span in _by_span(held, device=self._device)]
        for layer, states in enumerate(prefilled.layers):
            new = _states(states)
            self._add_layer(layer, *new)
            for stored, prompts in zip((self._keys[layer], self._values[layer]), new, strict=True):
                for rows, of, span in chunks:
                    span = min(span, prompts.shape[2])
                    stored[rows, :, :span] = prompts[of, :, :span]

    def begin_step(self, *, rows: slice, positions: Tensor, span: int) -> None:
        """Set the next forward pass: it runs `rows`, writes their tokens at `positions` [n], attends to the first `span`."""
        self._active, self._span, self._positions = rows, span, positions
        self._slots = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [n, H, 1, D] and return the active slice [n, H, S, D]; called by the model's attention."""
        self._add_layer(layer_idx, key_states, value_states)
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def move(self, *, sources: Tensor, targets: Tensor, held: Sequence[int]) -> None:
        """Copy held[i] positions of row sources[i] to row targets[i]; all are read before one is written."""
        chunks = [(sources[index], targets[index], span) for index, span in _by_span(held, device=self._device)]
        for tensor in (*self._keys, *self._values):
            moved = [tensor[of, :, :span] for of, _, span in chunks]
            for (_, to, span), states in zip(chunks, moved, strict=True):
                tensor[to, :, :span] = states

    def _write(self, stored: Tensor, states: Tensor) -> Tensor:
        heads, head_size = stored.shape[1], stored.shape[3]
        if heads not in self._slots:
            row_of_head = torch.arange(self._active.start * heads, self._active.stop * heads, device=stored.device)
            self._slots[heads] = (row_of_head.view(-1, heads) * self._length + self._positions[:, None]).view(-1)
        stored.view(-1, head_size).index_copy_(0, self._slots[heads], states.reshape(-1, head_size))
        return stored[self._active, :, : self._span]

    def _shape(self, rows: int, length: int) -> tuple[int, int]:
        """Return R and C with room for `rows` of `length`, growing in proportion where max_positions allows."""
        grown_rows = _grown(self._rows, needed=rows, limit=self._max_rows)
        grown_length = round_up(_grown(self._length, needed=length, limit=self._max_length))
        if self._max_positions is None or grown_rows * grown_length <= self._max_positions:
            return grown_rows, grown_length
        return max(rows, min(grown_rows, self._max_positions // length)), length

    def _add_layer(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Allocate a layer when its first states show the shape: keys [*, H, *, D]."""
        if layer == len(self._keys):
            self._keys.append(self._allocate(keys))
            self._values.append(self._allocate(values))

    def _allocate(self, like: Tensor) -> Tensor:
        """Allocate zeros, not uninitialised memory: a masked value still counts 0 times itself, and 0 * nan is nan.

        On the CPU they are pages that the kernel has not mapped yet, so a short row takes no memory for the length of a long
        one: every write covers only what a row holds. Small pages: numpy and torch ask for huge ones (2 MiB),
        and then the first positions of every head make all of it resident.
        """
        shape = (self._rows, like.shape[1], self._length, like.shape[3])
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        untouched = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            untouched.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(untouched, dtype=like.dtype).view(shape)


def _by_span(held: Sequence[int], *, device: torch.device) -> list[tuple[Tensor, int]]:
    """Group the indexes of `held` by the positions to copy: the next power of two, so under twice what is held.

    A row that holds nothing is in no group.
    """
    indexes = defaultdict(list)
    for index, length in enumerate(held):
        if length > 0:
            indexes[max(_SMALLEST_SPAN, 1 << (length - 1).bit_length())].append(index)
    return [(torch.tensor(group, device=device), span) for span, group in indexes.items()]


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise TypeError(f"{type(layer).__name__} holds another state than keys and values")
    return layer.keys, layer.values


def _grown(current: int, *, needed: int, limit: int) -> int:
    """Return at least `needed`; growth in proportion, up to `limit`, keeps the copying linear in the final size."""
    return max(current, needed, min(int(_GROWTH * current), limit)) if needed > current else current
