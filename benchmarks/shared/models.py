"""Random models of known sizes, and what the machine can do with a matrix."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES: dict[str, tuple[int, ...]] = {
    "0.1M": (384, 64, 192, 2, 2, 1, 32),
    "1M": (2048, 128, 384, 4, 4, 2, 32),
    "10M": (512, 512, 1024, 4, 8, 4, 64),
    "29M": (8192, 512, 1536, 8, 8, 4, 64),
    "30M": (384, 512, 1920, 8, 8, 4, 64),
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": (151936, 2048, 6144, 28, 16, 8, 128),
}
"""Vocabulary, hidden, intermediate, layers, heads, key heads, width of a head; the head is tied."""


def build_model(size: str, **settings: Any) -> Qwen3ForCausalLM:
    """Return a Qwen3 of the size, always with the same random weights; `settings` are those of its config."""
    vocab, hidden, intermediate, layers, heads, key_heads, width = SHAPES[size]
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**config | settings))


def fastest(work: Callable[[], object], *, repeats: int = 5, clock: Callable[[], float] = time.process_time) -> float:
    """Return the least seconds that the work took; CPU seconds of the process unless another clock is given."""
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def gemm_rate(device: str = "cpu") -> float:
    """Return FLOPs per second of a large square matrix product: float32 on a CPU, bfloat16 on a GPU."""
    if device == "cpu":
        left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
        return 2 * 1024**3 / fastest(lambda: left @ right)
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        left @ right
        torch.cuda.synchronize()

    return 2 * 8192**3 / fastest(product, clock=time.monotonic)
