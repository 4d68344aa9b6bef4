"""The tensors of every running row besides its keys and values: tokens, noise, limits, sampling parameters.

Legend: R = rows allocated, W = token positions allocated.

Invariants:
* row r's sequence is tokens[r, :lengths[r]], prompt then completion; logprobs[r, p] and uniforms[r, p] belong to the token
  at p;
* tensors grow when needed and never shrink; rows move in one call each for tokens, logprobs, noise, counts and parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BatchTensors:
    """Tensors with one row per running sequence."""

    def __init__(self, *, max_rows: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._device = device
        self.tokens = self._empty(0, 0, dtype=torch.long)  # [R, W]
        self.logprobs = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self.uniforms = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self._counts = self._empty(3, 0, dtype=torch.long)  # [3, R]
        self._parameters = self._empty(4, 0, dtype=torch.float32)  # [4, R]
        self._name_rows()

    def _name_rows(self) -> None:
        """Name the views [R] of counts and parameters: what is written to those shows in them."""
        # Tokens of prompt and completion so far; at how many a row ends, and from how many on it may (min_tokens).
        self.lengths, self.limits, self.ends_from = self._counts
        # 0 = greedy; greedy rows hold what cuts nothing.
        self.temperature, top_k, top_p, min_p = self._parameters
        self.truncation = {"top_k": top_k, "top_p": top_p, "min_p": min_p}

    def write(self, first_row: int, *, counts: Tensor, parameters: Tensor) -> None:
        """Set rows first_row..: counts [3, rows] and parameters [4, rows], in the order of their names."""
        rows = slice(first_row, first_row + counts.shape[1])
        self._counts[:, rows] = counts.to(self._device)
        self._parameters[:, rows] = parameters.to(self._device)

    def move(self, *, sources: Tensor, targets: Tensor) -> None:
        """Copy rows `sources` [m] to rows `targets` [m], all read before the first is written."""
        for tensor in (self.tokens, self.logprobs, self.uniforms):
            tensor[targets] = tensor[sources]
        for tensor in (self._counts, self._parameters):
            tensor[:, targets] = tensor[:, sources]

    def reserve(self, *, rows: int, width: int) -> None:
        """Make room for `rows` rows of `width` tokens; stored values stay."""
        old_rows, old_width = self.tokens.shape
        if rows <= old_rows and width <= old_width:
            return
        rows, width = max(rows, old_rows, min(2 * old_rows, self._max_rows)), max(width, old_width)
        self.tokens, self.logprobs, self.uniforms = (
            self._copied(old, rows, width) for old in (self.tokens, self.logprobs, self.uniforms)
        )
        self._counts, self._parameters = (self._copied(old, len(old), rows) for old in (self._counts, self._parameters))
        self._name_rows()

    def _copied(self, old: Tensor, *shape: int) -> Tensor:
        new = self._empty(*shape, dtype=old.dtype)
        new[tuple(slice(0, size) for size in old.shape)] = old
        return new

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)
