"""What the torch engine refuses, before it can be silently wrong or harm the requests beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from common.errors import EngineError
from workers.engine import GenerationRequest


def check_model(model: PreTrainedModel, *, max_model_len: int) -> None:
    """Raises ValueError unless every layer attends to all positions and takes the masks that the engine builds."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
    if layers != {"full_attention"} or (window is not None and window < max_model_len):
        found = f"{config.model_type} with layers {sorted(layers)} and window {window}"
        raise ValueError(f"the torch engine serves full-attention models, found {found}")
    if config._attn_implementation not in ("sdpa", "eager"):
        found = config._attn_implementation
        raise ValueError(f"the torch engine needs attn_implementation sdpa or eager, found {found}")


def check_request(request: GenerationRequest, *, max_model_len: int, vocab_size: int) -> None:
    """Raises EngineError for a request that could never run."""
    sampling, prompt = request.sampling, np.asarray(request.prompt_ids)
    total = len(prompt) + sampling.max_tokens
    problem = None
    if total > max_model_len:
        sizes = f"{len(prompt)} prompt + {sampling.max_tokens} new tokens = {total}"
        problem = f"{sizes} > {max_model_len}, the engine's max_model_len"
    elif min(len(prompt), sampling.max_tokens, sampling.n) < 1:
        sizes = f"{len(prompt)}, {sampling.max_tokens} and {sampling.n}"
        problem = f"prompt length, max_tokens and n must be at least 1, found {sizes}"
    elif prompt.min() < 0 or prompt.max() >= vocab_size:
        problem = f"prompt ids {prompt.min()}..{prompt.max()} are outside the vocabulary of {vocab_size}"
    elif sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        problem = f"temperature, top_p or top_k is out of range in {sampling}"
    if problem is not None:
        raise EngineError(f"group {request.group_id}: {problem}")


def check_sequences(
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], *, max_model_len: int, vocab_size: int
) -> None:
    """Raises EngineError for a sequence that cannot be scored."""
    for i, (prompt, tokens) in enumerate(sequences):
        total = len(prompt) + len(tokens)
        ids = np.concatenate([prompt, tokens])
        problem = None
        if len(prompt) == 0:
            problem = "its prompt is empty: nothing predicts its first token"
        elif total > max_model_len:
            problem = f"{total} tokens > {max_model_len}, the engine's max_model_len"
        elif ids.min() < 0 or ids.max() >= vocab_size:
            problem = f"token ids {ids.min()}..{ids.max()} are outside the vocabulary of {vocab_size}"
        if problem is not None:
            raise EngineError(f"sequence {i} of {len(sequences)} cannot be scored: {problem}")
