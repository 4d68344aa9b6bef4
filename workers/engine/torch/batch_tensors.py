"""What the device knows of every running row beside its keys and values: tokens, noise, limits, sampling parameters.

Legend: R = rows allocated, W = token positions allocated.

Invariants:
* row r's sequence is tokens[r, :lengths[r]], prompt then completion; logprobs[r, p] and uniforms[r, p] belong to the token
  at p;
* everything grows by need and never shrinks; rows move in one call each for tokens, logprobs, noise, counts and parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTS = ("lengths", "limits", "ends_from", "end_sets")
_PARAMETERS = ("temperature", "top_k", "top_p", "min_p")


class BatchTensors:
    """Tensors with one row per running completion."""

    def __init__(self, *, max_rows: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._device = device
        self.tokens = self._empty(0, 0, dtype=torch.long)  # [R, W]
        self.logprobs = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self.uniforms = self._empty(0, 0, dtype=torch.float32)  # [R, W]
        self._counts = self._empty(len(_COUNTS), 0, dtype=torch.long)  # [4, R]
        self._parameters = self._empty(len(_PARAMETERS), 0, dtype=torch.float32)  # [4, R]

    @property
    def lengths(self) -> Tensor:
        """[R], tokens of prompt and completion so far."""
        return self._counts[0]

    @property
    def limits(self) -> Tensor:
        """[R], the length at which a row ends."""
        return self._counts[1]

    @property
    def ends_from(self) -> Tensor:
        """[R], the length from which on the next token may be an end token."""
        return self._counts[2]

    @property
    def end_sets(self) -> Tensor:
        """[R], which set of end tokens ends the row."""
        return self._counts[3]

    @property
    def temperature(self) -> Tensor:
        """[R]; 0 = greedy."""
        return self._parameters[0]

    @property
    def truncation(self) -> dict[str, Tensor]:
        """top_k, top_p and min_p, [R] each; greedy rows hold what cuts nothing."""
        return dict(zip(_PARAMETERS[1:], self._parameters[1:], strict=True))

    def write(self, first_row: int, *, counts: Tensor, parameters: Tensor) -> None:
        """Set rows first_row..: counts [4, rows] and parameters [4, rows], in the order of the properties above."""
        rows = slice(first_row, first_row + counts.shape[1])
        self._counts[:, rows] = counts.to(self._device)
        self._parameters[:, rows] = parameters.to(self._device)

    def move(self, *, sources: Tensor, targets: Tensor) -> None:
        """Rows `sources` [m] become rows `targets` [m], all read before the first is written."""
        for tensor in (self.tokens, self.logprobs, self.uniforms):
            tensor[targets] = tensor[sources]
        for tensor in (self._counts, self._parameters):
            tensor[:, targets] = tensor[:, sources]

    def reserve(self, *, rows: int, width: int) -> None:
        """Room for `rows` rows of `width` tokens; what is stored stays."""
        old_rows, old_width = self.tokens.shape
        if rows <= old_rows and width <= old_width:
            return
        rows, width = max(rows, old_rows, min(2 * old_rows, self._max_rows)), max(width, old_width)
        self.tokens, self.logprobs, self.uniforms = (
            self._copied(old, rows, width) for old in (self.tokens, self.logprobs, self.uniforms)
        )
        self._counts, self._parameters = (self._copied(old, len(old), rows) for old in (self._counts, self._parameters))

    def _copied(self, old: Tensor, *shape: int) -> Tensor:
        new = self._empty(*shape, dtype=old.dtype)
        new[tuple(slice(0, size) for size in old.shape)] = old
        return new

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)
