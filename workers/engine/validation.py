"""What the torch engine refuses, before it can be silently wrong or harm other requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sluice.common.errors import EngineError
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest, ScoredSequence
from sluice.workers.engine.torch.kv_cache import round_up


def check_request(
    request: GenerationRequest,
    *,
    max_model_len: int,
    vocab_size: int,
    max_positions: int | None = None,
    has_tokenizer: bool = True,
) -> None:
    """Raise EngineError for a request that could never run. max_positions: tokens with room for keys and values."""
    problem = (
        _size_problem(request, max_model_len=max_model_len, max_positions=max_positions)
        or _id_problem(request.prompt_ids, what="prompt", vocab_size=vocab_size)
        or _sampling_problem(request.sampling, has_tokenizer=has_tokenizer)
    )
    if problem is not None:
        raise EngineError(f"group {request.group_id}: {problem}")


def _size_problem(request: GenerationRequest, *, max_model_len: int, max_positions: int | None) -> str | None:
    sampling, num_prompt = request.sampling, len(request.prompt_ids)
    if min(num_prompt, sampling.max_tokens, sampling.n) < 1:
        found = f"{num_prompt}, {sampling.max_tokens} and {sampling.n}"
        return f"prompt length, max_tokens and n must be at least 1, found {found}"
    total = num_prompt + sampling.max_tokens
    sizes = f"{num_prompt} prompt + {sampling.max_tokens} new tokens = {total}"
    if total > max_model_len:
        return f"{sizes} > {max_model_len}, the engine's max_model_len"
    if max_positions is not None and sampling.n * round_up(total) > max_positions:
        return (
            f"{sampling.n} completions of {sizes} need keys and values for {sampling.n * round_up(total)} tokens, there is "
            f"room for {max_positions}: raise rollout.kv_cache_mib, or lower max_tokens or n"
        )
    return None


def _id_problem(ids: NDArray[np.int32], *, what: str, vocab_size: int) -> str | None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        return f"{what} ids {ids.min()}..{ids.max()} are outside the vocabulary of {vocab_size}"
    return None


def _sampling_problem(sampling: SamplingParams, *, has_tokenizer: bool) -> str | None:
    ranges = {
        "temperature": (sampling.temperature >= 0, "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "min_p": (0 <= sampling.min_p <= 1, "in [0, 1]"),
        "min_tokens": (0 <= sampling.min_tokens <= sampling.max_tokens, f"in [0, max_tokens={sampling.max_tokens}]"),
        "stop": (all(sampling.stop), "texts that are not empty"),
    }
    for name, (is_right, allowed) in ranges.items():
        if not is_right:
            return f"{name} must be {allowed}, found {getattr(sampling, name)!r}"
    if sampling.stop and not has_tokenizer:
        return "stop texts need a tokenizer, and the model has none"
    return None


def check_sequences(sequences: Sequence[ScoredSequence], *, max_model_len: int, vocab_size: int) -> None:
    """Raise EngineError for a sequence that cannot be scored."""
    problem: str | None
    for i, (prompt, tokens) in enumerate(sequences):
        total = len(prompt) + len(tokens)
        if len(prompt) == 0:
            problem = "its prompt is empty: nothing predicts its first token"
        elif total > max_model_len:
            problem = f"{total} tokens > {max_model_len}, the engine's max_model_len"
        else:
            problem = _id_problem(np.concatenate([prompt, tokens]), what="token", vocab_size=vocab_size)
        if problem is not None:
            raise EngineError(f"sequence {i} of {len(sequences)} cannot be scored: {problem}")
