"""Tokens per CPU second of the torch engine, beside transformers (generate, continuous batching) and vLLM's CPU build.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --vllm-python VENV/bin/python

One model, the same prompts and the same sampling for all sides, in one run, in turns (other load on the machine moves all
of them): groups of 8, sampled at temperature 1, logprobs of the sampled tokens. Random weights of a Qwen3 of 0.1 M
parameters (the quickstart's) and of 29 M; one token in 32 ends a completion, so lengths are ragged (mean 27, at most 64).
Reported per side: useful tokens (up to the end token) per CPU second of its process, the best of `--repeats`, and the median
of the paired ratios engine / side. Warm-up and start are left out. vLLM is left out where --vllm-python cannot import it.

`limit` says what a core of this machine could reach: bytes that must move per token (weights once per step for all rows,
keys and values of a row) at the measured memory bandwidth, and FLOPs at the measured rate of a large matrix product; the
slower of the two bounds tokens per second, with rows as many as there were on average. `generation_costs.py` measures what
one long row costs the others, and what a policy swap does.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.shared.models import SHAPES, build_model, fastest, gemm_rate
from benchmarks.shared.processes import PeerProcess, missing
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.kv_cache import bytes_per_token

GROUP_SIZE, MAX_TOKENS, PROMPT_LENGTHS, MAX_MODEL_LEN, PAD = 8, 64, (12, 18), 256, 0
SIZES = ("0.1M", "29M")

Side = Callable[[], tuple[float, int]]
"""One call generates everything; CPU seconds and useful tokens."""


def ragged_model(size: str) -> PreTrainedModel:
    """Return a model in which one token in 32 ends a completion."""
    vocab_size = SHAPES[size][0]
    ends = list(range(1, 1 + vocab_size // 32))
    return build_model(size, eos_token_id=ends, initializer_range=0.08 if size == "0.1M" else 0.02).eval()


def build_prompts(num_groups: int, *, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    low, high = PROMPT_LENGTHS
    first = vocab_size // 32 + 1
    return [rng.integers(first, vocab_size, rng.integers(low, high + 1)).tolist() for _ in range(num_groups)]


def measured(generate: Callable[[], int]) -> Side:
    def side() -> tuple[float, int]:
        started = time.process_time()
        num_tokens = generate()
        return time.process_time() - started, num_tokens

    return side


def engine_side(model: PreTrainedModel, prompts: list[list[int]], stack: ExitStack) -> Side:
    ends, count = model.config.eos_token_id, len(prompts) * GROUP_SIZE
    engine = TorchEngine(model, eos_token_ids=ends, max_sequences=count, max_model_len=MAX_MODEL_LEN)
    stack.callback(engine.close)
    engine.stage(0, "", {name: weight.detach().clone() for name, weight in named_weights(model).items()})
    threads = stack.enter_context(ThreadPoolExecutor(len(prompts)))
    seeds = itertools.count()  # other noise in every turn, as the other sides have: a fixed draw may be long or short

    def generate(index: int) -> int:
        sampling = SamplingParams(n=GROUP_SIZE, max_tokens=MAX_TOKENS, seed=next(seeds))
        ids = np.array(prompts[index], dtype=np.int32)
        request = GenerationRequest(group_id=str(index), prompt_ids=ids, sampling=sampling)
        return sum(len(completion.token_ids) for completion in engine.generate(request))

    return measured(lambda: sum(threads.map(generate, range(len(prompts)))))


def generate_side(model: Any, prompts: list[list[int]]) -> Side:
    """`model.generate` with its dynamic cache, and the logits that logprobs would be taken from."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    batch = ids.repeat_interleave(GROUP_SIZE, 0)

    def generate() -> int:
        output = model.generate(
            batch, attention_mask=(batch != PAD).long(), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=MAX_TOKENS, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = output.sequences[:, width:]
        finished = torch.isin(new, torch.tensor(model.config.eos_token_id)).int()
        return int((finished.cumsum(1) - finished == 0).sum())

    return measured(generate)


def continuous_side(model: Any, prompts: list[list[int]], stack: ExitStack) -> Side:
    """Return transformers' continuous batching, kept alive between calls; one page holds a sequence, all requests fit."""
    count = len(prompts) * GROUP_SIZE
    sampling = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=MAX_TOKENS, num_return_sequences=GROUP_SIZE,
        eos_token_id=model.config.eos_token_id, pad_token_id=PAD,
    )  # fmt: skip
    batching = ContinuousBatchingConfig(
        page_size=128, num_blocks=2 * count, max_batch_tokens=max(512, count), max_requests_per_batch=count,
        return_logprobs=True, use_cuda_graph=False, use_async_batching=False, auto_switch_to_flash=False,
    )  # fmt: skip
    stack.callback(lambda: model.destroy_cached_continuous_batching_manager())

    def generate() -> int:
        outputs = model.generate_batch(
            prompts,
            generation_config=sampling,
            continuous_batching_config=batching,
            persistent_manager=True,
            warmup=False,
        )
        assert len(outputs) == count, f"{len(outputs)} of {count} requests finished"
        return sum(len(output.generated_tokens) for output in outputs.values())

    return measured(generate)


def vllm_side(vllm: PeerProcess, model: PreTrainedModel, prompts: list[list[int]]) -> Side:
    request = {
        "prompts": prompts, "n": GROUP_SIZE, "max_tokens": MAX_TOKENS, "stop_token_ids": model.config.eos_token_id,
        "max_sequences": len(prompts) * GROUP_SIZE,
    }  # fmt: skip

    def side() -> tuple[float, int]:
        reply = vllm.ask(**request)
        return reply["cpu_s"], reply["num_tokens"]

    return side


def compare(
    size: str, num_sequences: int, *, repeats: int, vllm: PeerProcess | None, stack: ExitStack
) -> dict[str, Any]:
    vocab_size = SHAPES[size][0]
    prompts = build_prompts(num_sequences // GROUP_SIZE, vocab_size=vocab_size)
    sides = {
        "engine": engine_side(ragged_model(size), prompts, stack),
        "generate": generate_side(ragged_model(size), prompts),
        "continuous_batching": continuous_side(ragged_model(size), prompts, stack),
    }
    if vllm is not None:
        sides["vllm"] = vllm_side(vllm, ragged_model(size), prompts)
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for turn in range(1 + repeats):
        for name, side in sides.items():
            run = side()
            if turn > 0:
                runs[name].append(run)
    rates = {name: [tokens / cpu_s for cpu_s, tokens in run] for name, run in runs.items()}
    mean_tokens = {name: statistics.mean(tokens for _, tokens in run) / num_sequences for name, run in runs.items()}
    best = {name: round(max(rate)) for name, rate in rates.items()}
    bound = limit(size, num_sequences, mean_tokens=mean_tokens["engine"], prompts=prompts)
    return {
        "model": size,
        "sequences": num_sequences,
        "mean_completion_tokens": {name: round(mean, 1) for name, mean in mean_tokens.items()},
        "tokens_per_cpu_s": best,
        "engine_over": {
            name: round(statistics.median(ours / theirs for ours, theirs in zip(rates["engine"], rate, strict=True)), 2)
            for name, rate in rates.items()
            if name != "engine"
        },
        "limit": {**bound, "engine_fraction": round(best["engine"] / bound["tokens_per_cpu_s"], 3)},
    }


def limit(size: str, num_sequences: int, *, mean_tokens: float, prompts: list[list[int]]) -> dict[str, float]:
    """Bounds of one core for this job, from sizes and from what the machine does right now."""
    model = ragged_model(size)
    embedding = model.get_input_embeddings().weight
    weights = sum(
        weight.numel() for weight in model.parameters()
    )  # tied: the embedding is the head, read once per step
    mean_prompt = statistics.mean(map(len, prompts))
    rows = num_sequences * mean_tokens / MAX_TOKENS  # mean over the steps until the last completion ends
    body = weights - embedding.numel()
    flops = 2 * weights + 2 * body * mean_prompt / GROUP_SIZE / mean_tokens  # and the prompt's, once per group
    moved = 4 * weights / rows + bytes_per_token(model) * (mean_prompt + mean_tokens / 2)
    bandwidth, gemm = memory_bandwidth(), gemm_rate()
    return {
        "flops_per_token": round(flops),
        "bytes_per_token": round(moved),
        "gemm_gflop_per_s": round(gemm / 1e9, 1),
        "memory_gb_per_s": round(bandwidth / 1e9, 1),
        "tokens_per_cpu_s": round(min(gemm / flops, bandwidth / moved)),
    }


def memory_bandwidth() -> float:
    """Bytes per second that a sum reads from memory far larger than the caches."""
    data = torch.ones(2**27)  # 512 MiB
    return data.nbytes / fastest(data.sum)


def measure(arguments: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """All counts of sequences at one size; vLLM has one process for them."""
    with ExitStack() as process:
        vllm = None
        if arguments.vllm_python:
            folder = process.enter_context(tempfile.TemporaryDirectory())
            ragged_model(size).save_pretrained(folder)
            vllm = PeerProcess("vllm_generation", folder, python=arguments.vllm_python, stack=process)
        found = []
        for count in arguments.sequences:
            with ExitStack() as stack:
                found.append(compare(size, count, repeats=arguments.repeats, vllm=vllm, stack=stack))
            found[-1]["vllm"] = vllm.hello if vllm else None
        return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 256], help="running together, each")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", default=sys.executable, help="Python of an environment with vLLM")
    arguments = parse(parser, argv, quick={"sequences": [8], "models": ["0.1M"], "repeats": 1})
    torch.set_num_threads(1)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    absent = missing("vllm", arguments.vllm_python)
    arguments.vllm_python = None if absent else arguments.vllm_python
    results = [found for size in arguments.models for found in measure(arguments, size)]
    arguments.vllm_python = None  # a path of this machine
    publish("generation", arguments, {"missing": [absent] if absent else [], "results": results})


if __name__ == "__main__":
    main()
