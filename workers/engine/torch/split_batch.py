"""Which rows run in which forward pass, so that a few long ones do not make all others attend to their length.

A forward pass attends to the longest of its rows in every row of it. A second pass over the short rows alone saves the
difference and costs what any pass costs at least (Python, kernel launches, reading the weights once more).

Legend: n = rows. An offset is a row's length less a number that all rows share, so a plan stays right while rows grow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPLIT_SAVES = {"cpu": 2**15, "cuda": 2**19}
"""Attended positions (rows * length) per step that pay for a second forward pass. On CPU the smallest one costs as much as
31 thousand of them at 0.1 M parameters and 8 thousand at 29 M (generation_costs.py); CUDA's is an estimate."""


def split_batch(offsets: NDArray[np.int64], *, split_saves: int) -> tuple[list[int] | None, list[tuple[slice, int]]]:
    """The order that the rows should have first (none = as they are), then per pass its rows and their largest offset."""
    n = len(offsets)
    if n == 0:
        return None, []
    order = None
    if n * (offsets.max() - offsets.min()) >= split_saves:
        ordered = np.sort(offsets)[::-1]
        possible = saved_positions(ordered).max()
        if possible >= split_saves and 5 * saved_positions(offsets).max() < 4 * possible:
            order, offsets = np.argsort(-offsets, kind="stable").tolist(), ordered
        saved = saved_positions(offsets)
        if saved.max() >= split_saves:
            split = int(saved.argmax())
            stages = [slice(0, split), slice(split, n)]
            return order, [(stage, int(offsets[stage].max())) for stage in stages]
    return order, [(slice(0, n), int(offsets.max()))]


def saved_positions(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n], attended positions that a step saves when the rows from a on run apart from the a rows before them."""
    n, a = len(offsets), np.arange(len(offsets))
    longest_from = np.maximum.accumulate(offsets[::-1])[::-1]
    longest_before = np.maximum.accumulate(np.append(offsets[0], offsets[:-1]))
    return n * offsets.max() - a * longest_before - (n - a) * longest_from
