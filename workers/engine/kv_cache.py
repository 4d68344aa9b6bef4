"""The keys and values of all running rows, one slot per row and position.

Legend: R = rows allocated, C = positions allocated, n = rows active (always the first n), S = positions attended,
H = key-value heads, D = head size (keys and values may differ in it), G = prompts, P = tokens prefilled.

Invariants:
* tensors are [R, C, H, D], a token's heads side by side: writing one token per row is one contiguous row copy;
* they grow by steps, layer by layer, when a longer row or more rows come, and never shrink;
* a slot is written before it is attended: whoever builds the mask takes it from lengths.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

POSITION_STEP = 16
"Attended positions are rounded up to this: few distinct shapes, and masks aligned as CUDA kernels want them."
_GROWTH = 1.5


def cache_argument(model: torch.nn.Module) -> str:
    """The name under which a model's `forward` takes its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def round_up(length: int, step: int = POSITION_STEP) -> int:
    """The smallest multiple of `step` that is at least `length`."""
    return -(-length // step) * step


class SlotCache(Cache):
    """A transformers cache whose rows differ in length. Decodes only: prefill runs on a DynamicCache, see `fill`."""

    def __init__(self, *, max_rows: int, max_length: int) -> None:
        super().__init__(layers=[])
        self._max_rows = max_rows
        self._max_length = round_up(max_length)
        self._rows = 0
        self._length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._active = 0
        self._span = 0
        self._slots = torch.empty(0, dtype=torch.long)

    def reserve(self, *, rows: int, length: int) -> None:
        """Room for `rows` rows of `length` positions; what is stored stays."""
        if rows <= self._rows and length <= self._length:
            return
        self._rows = _grown(self._rows, needed=rows, limit=self._max_rows)
        self._length = round_up(_grown(self._length, needed=length, limit=self._max_length))
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = self._allocate(old)
                new[: old.shape[0], : old.shape[1]] = old
                tensors[layer] = new

    def fill(self, prefilled: DynamicCache, *, first_row: int, source: Tensor) -> None:
        """Copy prefilled [G, H, P, D] into rows first_row.. : row first_row + i takes prompt source[i]."""
        for layer, states in enumerate(prefilled.layers):
            assert isinstance(states, DynamicLayer) and states.keys is not None and states.values is not None
            self._add_layer(layer, states.keys.transpose(1, 2), states.values.transpose(1, 2))
            for ours, theirs in ((self._keys[layer], states.keys), (self._values[layer], states.values)):
                rows = slice(first_row, first_row + len(source))
                ours[rows, : theirs.shape[2]] = theirs.transpose(1, 2)[source]

    def begin_step(self, *, positions: Tensor, span: int) -> None:
        """The next forward pass writes row i's token at positions[i] and attends to the first `span` positions; [n]."""
        self._active = len(positions)
        self._span = span
        self._slots = positions + torch.arange(0, self._active * self._length, self._length, device=positions.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: stores [n, H, 1, D], returns the active slice [n, H, S, D]."""
        self._add_layer(layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2))
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def move(self, *, sources: Tensor, targets: Tensor, span: int) -> None:
        """Rows `sources` [m] become rows `targets` [m], up to `span` positions; the two sets are disjoint."""
        for tensor in (*self._keys, *self._values):
            tensor[targets, :span] = tensor[sources, :span]

    def _write(self, stored: Tensor, states: Tensor) -> Tensor:
        stored.view(-1, *stored.shape[2:]).index_copy_(0, self._slots, states.squeeze(2))
        return stored[: self._active, : self._span].transpose(1, 2)

    def _add_layer(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Shapes are learnt from the first states of each layer: keys [*, *, H, D]."""
        if layer == len(self._keys):
            self._keys.append(self._allocate(keys))
            self._values.append(self._allocate(values))

    def _allocate(self, like: Tensor) -> Tensor:
        """Zeros, not uninitialised memory: a masked value still counts 0 times itself, and 0 * nan is nan."""
        return torch.zeros(self._rows, self._length, *like.shape[2:], dtype=like.dtype, device=like.device)


def _grown(current: int, *, needed: int, limit: int) -> int:
    """At least `needed`; growing in proportion, up to `limit`, keeps the copying linear in the final size."""
    return max(current, needed, min(int(_GROWTH * current), limit)) if needed > current else current
