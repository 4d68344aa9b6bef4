"""The sequences that every side of training_step.py trains on, and the recipe of the step.

Legend: B = sequences, P = prompt tokens, T = completion tokens, S = P + T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shared.models import SHAPES

ADAMW: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, MAX_GRAD_NORM, GROUP_SIZE = 0.1, 1.0, 4
PASSES = 2
"""Micro-batches that a step's tokens are trained in."""
SIGMA, MEDIAN_SHARE = 0.8, 0.2
"""Of the ragged batch's completion lengths, a log-normal: standard deviation of ln T, and median over the bound."""


Step = Callable[[str], float]
"""One optimizer step on the batch of that name; the gradient norm before clipping."""


@dataclass(frozen=True, slots=True)
class Sequence:
    prompt: NDArray[np.int32]
    "[P]"
    completion: NDArray[np.int32]
    "[T]"
    advantage: float


def draw_batch(kind: str, *, size: str, step_tokens: int) -> list[Sequence]:
    """Draw groups of 4 until the step's tokens are full. Lengths scale with the step: `equal` is 1/64 of it as prompt and 3/64
    as completion; `ragged` has prompts of 1/128 to 1/64 and log-normal completions of at most 7/64."""
    rng = np.random.default_rng(kind == "ragged")
    vocab_size, unit = SHAPES[size][0], step_tokens // 128
    bound = 14 * unit
    sequences: list[Sequence] = []
    while sum(len(s.prompt) + len(s.completion) for s in sequences) < step_tokens:
        prompt = _tokens(rng, 2 * unit if kind == "equal" else int(rng.integers(unit, 2 * unit + 1)), vocab_size)
        scores = rng.normal(size=GROUP_SIZE)
        for score in scores - scores.mean():
            drawn = 6 * unit if kind == "equal" else rng.lognormal(math.log(MEDIAN_SHARE * bound), SIGMA)
            completion = _tokens(rng, int(np.clip(drawn, 1, bound)), vocab_size)
            sequences.append(Sequence(prompt, completion, float(score)))
    return sequences


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> NDArray[np.int32]:
    return rng.integers(1, vocab_size, count).astype(np.int32)


def measured_sizes(batches: dict[str, list[Sequence]]) -> dict[str, dict[str, int]]:
    """Per batch: tokens, completion tokens, sequences, and the sum of squared lengths."""
    lengths = {kind: [len(row.prompt) + len(row.completion) for row in rows] for kind, rows in batches.items()}
    return {
        kind: {
            "tokens": sum(lengths[kind]),
            "completion_tokens": sum(len(row.completion) for row in rows),
            "sequences": len(rows),
            "longest": max(lengths[kind]),
            "sum_of_squares": sum(length**2 for length in lengths[kind]),
        }
        for kind, rows in batches.items()
    }
