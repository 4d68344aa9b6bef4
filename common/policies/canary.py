"""The canary of a policy: a few sequences with the trainer's logprobs, which a sampler that has loaded it must reproduce.

    trainer:  optimizer step --> score a few sequences of its batch --> publish them in the manifest
    worker:   swap --> engine.score(the same sequences) --> mean |difference| --> heartbeat
              and once per version a completion of its own, as sampled and as scored without the cache, to check the cache
    readers:  over the bound of the precisions involved: alarm `sampler_mismatch`

A digest proves which bytes arrived; the canary proves that the engine computes with them: an engine that keeps an old output
head, or scales its logits, has the right digest and samples from another policy. Both sides score at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import SerializationError
from sluice.common.types import Group

NUM_SEQUENCES = 2
MAX_TOKENS = 32
"""Completion tokens of one sequence: enough for a mean, and a few milliseconds of work."""
WORST = 1e6
"""JSON has no infinity."""
BOUNDS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}
"""Nats. Measured means between a float32 trainer and vLLM: 1e-6 in float32, 4e-3 to 2e-2 in bfloat16; engines that served
other weights than they said were 1 to 8 off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanarySequence:
    """One prompt and completion, as the trainer scores it."""

    prompt_ids: NDArray[np.int32]
    "[P]"
    token_ids: NDArray[np.int32]
    "[T]"
    logprobs: NDArray[np.float32]
    "[T], at temperature 1"
    base_logprobs: NDArray[np.float32] | None = None
    "[T], of the base weights of a LoRA adapter; none = the version is not an adapter"

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> CanarySequence:
        """Decode. Raises SerializationError for what is not a sequence."""
        try:
            found = cls(**wire)
            rows = [found.token_ids, found.logprobs, *([] if found.base_logprobs is None else [found.base_logprobs])]
            dtypes = [found.prompt_ids.dtype, *(row.dtype for row in rows)]
            shapes = {row.shape for row in rows}
        except (TypeError, AttributeError) as error:
            raise SerializationError(f"its canary: {error}") from None
        if [str(dtype) for dtype in dtypes[:4]] != ["int32", "int32", "float32", "float32"][: len(dtypes)]:
            raise SerializationError(f"its canary holds {', '.join(map(str, dtypes))}")
        if found.prompt_ids.ndim != 1 or shapes != {(len(found.token_ids),)}:
            raise SerializationError("the rows of its canary differ in length")
        return found


def choose_sequences(groups: Sequence[Group]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return the shortest sequences of a batch, one per group: (prompt_ids, token_ids), the completion cut to MAX_TOKENS."""
    pairs = [(group.prompt_ids, group.episodes[0].completion.token_ids[:MAX_TOKENS]) for group in groups]
    pairs = sorted((pair for pair in pairs if len(pair[1])), key=lambda pair: len(pair[0]) + len(pair[1]))
    return pairs[:NUM_SEQUENCES]


def random_sequences(vocab_size: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return fixed random sequences, for a trainer that has seen no batch yet."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (NUM_SEQUENCES, 16), dtype=np.int32)
    return [(row[:8], row[8:]) for row in ids]


def mean_difference(expected: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]]) -> float:
    """Return the mean over all tokens of |difference of logprobs|, in nats; at most WORST, also where one is not finite."""
    difference = float(np.abs(np.concatenate(list(found)) - np.concatenate(list(expected))).mean())
    return min(difference, WORST) if math.isfinite(difference) else WORST


def adapter_share(canary: Sequence[CanarySequence], found: Sequence[NDArray[np.float32]]) -> tuple[float, float] | None:
    """Return the share of a LoRA adapter's effect that a sampler shows (1 = all, 0 = it samples from the base), and its
    standard error; none where the version is not an adapter, or has no effect.

        d = adapted - base, e = found - base: share = <e, d> / <d, d>        the slope of e on d, over all tokens

    The plain difference detects only what exceeds the bound of the sampler's precision. The slope is measured against the
    sampler's own scatter, and detects a missing adapter whose effect is a tenth of the bound.
    """
    if not canary or any(sequence.base_logprobs is None for sequence in canary):
        return None
    base = np.concatenate([sequence.base_logprobs for sequence in canary]).astype(np.float64)
    effect = np.concatenate([sequence.logprobs for sequence in canary]).astype(np.float64) - base
    shown = np.concatenate(list(found)).astype(np.float64) - base
    size = float(effect @ effect)
    if size == 0 or len(base) < 2 or not np.isfinite(shown).all():
        return None
    share = float(shown @ effect) / size
    scatter = shown - share * effect
    return share, math.sqrt(float(scatter @ scatter) / (len(base) - 1) / size)


def is_adapter_missing(share: float, error: float) -> bool:
    """Return whether less than half of the adapter's effect is there, by four standard errors."""
    return share + 4 * error < 0.5


def mismatch_bound(*dtypes: str) -> float:
    """Return the bound of the least precise of the sampler's and the trainer's precisions, in nats."""
    return max(BOUNDS[dtype] for dtype in dtypes)
