"""Whether a model computes a sequence among others as it computes that sequence alone is found by running it on these rows.

    scoring, padded rows   common/models/logprobs.py    check_scoring     else refused
    the output head        common/models/logprobs.py    _head_is_plain    else the model's own forward pass
    packed rows            common/models/packing.py     enable_packing    else padded
    prefill and decoding   workers/engine/torch/probe.py                  else refused

The reference is always a fresh forward pass of one sequence: no padding, no mask, no cache. The rows are ragged, and each
number of the config that may bound positions is crossed by one of them: a window, the original length of a scaled rope, the
number of learned positions. What depends on anything else (noise, the other rows, padding) differs in every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sluice.common.errors import ConfigError

COMPARED = 8
"""Last tokens of a row that are compared."""
EXACT = 1e-4
"""Nats by which logprobs in float32 may differ. Rounding stays a hundred times below in models of a few layers."""
LOADED = 2e-3
"""The same for the weights of a run, in many layers."""
_HALF = 0.3
"""Mean over a row in half precision, where rounding alone reaches 0.1 at a token."""
_NO_POSITIONS = ("hidden", "intermediate", "ffn", "inner", "vocab", "head", "layer", "rank", "dim", "token_i", "expert")
"""Parts of the names of config numbers that are widths, counts and ids."""
DRAWS = (0, 100)
"""Seeds of the rows. A second draw decides: where a router's choice is a tie, rounding alone can change one token."""
_MARGIN = 4
_MAX_BOUNDS = 8
_ROUNDED = 16
"""An engine's rows attend to a multiple of this (`kv_cache.POSITION_STEP`): a window that no row reaches may still cut them."""


def probe_lengths(config: Any, *, longest: int) -> list[int]:
    """Return the lengths of rows to try, in tokens, longest first: none over `longest`, each bound in the config crossed."""
    numbers = set(_numbers(config.get_text_config().to_dict()))
    bounds = sorted(number for number in numbers if COMPARED < number < longest + _ROUNDED)[-_MAX_BOUNDS:]
    wanted = [COMPARED + 1, 3 * COMPARED, *(bound + _MARGIN for bound in bounds)]
    return sorted({min(length, longest) for length in wanted}, reverse=True)


def _numbers(config: Any, name: str = "") -> Iterator[int]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers(value, str(key))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _numbers(value, name)
    elif type(config) is int and not any(part in name for part in _NO_POSITIONS):
        yield config


def draw_ids(model: Any, length: int, *, seed: int) -> Tensor:
    """Return random token ids, long [length], on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (length,), generator=generator)
    return ids.to(next(model.parameters()).device)


def fresh_logprobs(model: Any, ids: Tensor, *, count: int) -> Tensor:
    """Return the logprobs float32 [count] of the last `count` of ids [S], by a forward pass of these alone."""
    few = {"logits_to_keep": count + 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    logits = model(input_ids=ids[None], use_cache=False, **few).logits[0, -count - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[-count:, None]).squeeze(-1)


def _check_length(model: Any, length: int) -> None:
    """Check that the model runs sequences of so many tokens at all. Raises ConfigError."""
    try:
        fresh_logprobs(model, draw_ids(model, length, seed=0), count=1)
    except Exception as error:  # any exception of an unusual model
        raise ConfigError(
            f"{type(model).__name__} cannot run sequences of {length} tokens ({one_line(error)}): set trainer.seq_len (and "
            "rollout.max_model_len) to what it has positions for, or use another model"
        ) from error


def difference(
    model: Any,
    compute: Callable[[int], tuple[Sequence[Tensor], Sequence[Tensor]]],
    *,
    longest: int,
    bound: float,
    refused: str,
    advice: str,
) -> float | None:
    """Return by how many nats what is computed differs in every draw; none where it is rounding in one of them.

    compute: seed of a draw -> logprobs found, and those of fresh passes. bound: as of `_excess`. Raises ConfigError, which says
    `refused` and `advice`, where the model cannot run the rows.
    """
    differs: float | None = None
    try:
        for seed in DRAWS:
            found, expected = compute(seed)
            differs = _excess(found, expected, dtype=next(model.parameters()).dtype, bound=bound)
            if differs is None:
                break
    except Exception as error:  # any exception of an unusual model
        _check_length(model, probe_lengths(model.config, longest=longest)[0])
        raise ConfigError(f"{refused} ({one_line(error)}): {advice}") from error
    return differs


def _excess(found: Sequence[Tensor], expected: Sequence[Tensor], *, dtype: torch.dtype, bound: float) -> float | None:
    """Return by how many nats two lists of logprobs differ at most; none where that is rounding.

    bound: for float32, in nats; where all tokens are nearly equally likely, a share of what distinguishes them.
    """
    rows = [(a.float().cpu() - b.float().cpu()).abs() for a, b in zip(found, expected, strict=True)]
    largest = float(torch.cat(rows).max())
    if dtype in (torch.float16, torch.bfloat16):
        return None if all(float(row.mean()) <= _HALF for row in rows) else largest
    spread = float(torch.cat([row.float().cpu() for row in expected]).std(correction=0))
    return None if largest <= bound * min(1.0, max(0.05, spread)) else largest


def one_line(error: Exception) -> str:
    """Return the kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
