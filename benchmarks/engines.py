"""Tokens per second of both engines behind the contract, and what a policy update costs them, on one device.

    python benchmarks/engines.py --device cuda --size qwen3-0.6b --dtype bfloat16      (scripts/gpu_check)
    python benchmarks/engines.py                                                       a small model on a CPU

Random weights of the shape; 64 groups of 8 completions, prompts of 128 tokens, completions of exactly 256, all submitted at
once; then the same with five policies staged meanwhile. Each engine has a process of its own. An engine that is not installed
is left out; one that cannot run is reported with its error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import numpy as np
import torch

from benchmarks.shared.models import SHAPES, build_model
from benchmarks.shared.processes import missing
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.models.assets import ModelAssets
from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import Engine
from sluice.workers.rollout import make_engine
from tests.builders import letter_tokenizer, make_config

GROUP_SIZE, PROMPT_TOKENS, NUM_UPDATES = 8, 128, 5
VOCABULARY = 380
"""Tokens that prompts are made of; every size has them."""
NO_END = 0
"""The end token; min_tokens keeps it away."""


def measure(engine_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: tokens per second, alone and under policy updates."""
    model = build_model(arguments.size).to(getattr(torch, arguments.dtype))
    weights = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    new_tokens = arguments.new_tokens
    length = PROMPT_TOKENS + new_tokens
    config = make_config(
        rollout={"engine": engine_name, "device": arguments.device, "dtype": arguments.dtype, "max_model_len": length,
                 "max_sequences": GROUP_SIZE * arguments.groups, "kv_cache_mib": arguments.kv_cache_mib},
        trainer={"seq_len": length},
    )  # fmt: skip
    assets = ModelAssets(
        config=model.config.to_dict(), tokenizer_files=letter_tokenizer(VOCABULARY), eos_token_ids=(NO_END,)
    )
    started = time.monotonic()
    engine = make_engine(config, assets)
    engine.stage(0, "0", weights)
    _generate(engine, num_groups=2, new_tokens=new_tokens, seed=1000)  # warm-up
    start_s = time.monotonic() - started
    job = {"num_groups": arguments.groups, "new_tokens": new_tokens}
    rates = [_generate(engine, **job, seed=turn) for turn in range(arguments.repeats)]
    updates = _stage_updates(engine, weights, period_s=arguments.groups * GROUP_SIZE * new_tokens / max(rates) / 6)
    rate_under_updates = _generate(engine, **job, seed=500)
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


def _generate(engine: Engine, *, num_groups: int, new_tokens: int, seed: int) -> float:
    """Return tokens per wall second of this many groups submitted at once."""
    rng = np.random.default_rng(seed)
    sampling = {"n": GROUP_SIZE, "max_tokens": new_tokens, "min_tokens": new_tokens}
    requests = [
        GenerationRequest(
            group_id=f"{seed}/{index}",
            prompt_ids=rng.integers(1, VOCABULARY, PROMPT_TOKENS).astype(np.int32),
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
    """Measure in a fresh process; where the engine is not installed or fails, only say so."""
    if engine_name != "torch" and (absent := missing(engine_name, sys.executable)):
        return {"missing": absent}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(measure, engine_name, arguments).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=list(SHAPES), default="1M")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--kv-cache-mib", type=int, help="none = the engine's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    quick = {"size": "0.1M", "groups": 2, "new_tokens": 16, "repeats": 1, "kv_cache_mib": 128}
    arguments = parse(parser, argv, quick=quick)
    results = {name: measured(name, arguments) for name in ("torch", "vllm")}
    publish(f"engines_{arguments.device}", arguments, {"results": results})
    sys.exit(1 if any("error" in result for result in results.values()) else 0)


if __name__ == "__main__":
    main()
