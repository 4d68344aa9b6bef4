"""Tokens per CPU second of the torch engine, beside transformers (generate, continuous batching) and vLLM's CPU build.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --vllm-python VENV/bin/python --out benchmarks/results/generation.json

One model, the same prompts and the same sampling for all sides, in one run, in turns (other load on the machine moves all
of them): groups of 8, sampled at temperature 1, logprobs of the sampled tokens. Random weights of a Qwen3 of 0.1 M
parameters (the quickstart's) and of 29 M; one token in 32 ends a completion, so lengths are ragged (mean 27, at most 64).
Reported per side: useful tokens (up to the end token) per CPU second of its process, the best of `--repeats`, and the median
of the paired ratios engine / side. Warm-up and start are left out. Without --vllm-python vLLM is left out.

`limit` says what a core of this machine could reach: bytes that must move per token (weights once per step for all rows,
keys and values of a row) at the measured memory bandwidth, and FLOPs at the measured rate of a large matrix product; the
slower of the two bounds tokens per second, with rows as many as there were on average. `generation_costs.py` measures what
one long row costs the others, and what a policy swap does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from report import publish
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.kv_cache import bytes_per_token

GROUP_SIZE, MAX_TOKENS, PROMPT_LENGTHS, MAX_MODEL_LEN, PAD = 8, 64, (12, 18), 256, 0
SHAPES: dict[str, dict[str, Any]] = {
    "0.1M": {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.08,
    },
    "29M": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip

Side = Callable[[], tuple[float, int]]
"""One call generates everything; CPU seconds and useful tokens."""


def build_model(size: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = SHAPES[size]
    return Qwen3ForCausalLM(
        Qwen3Config(
            **shape, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=None,
            eos_token_id=end_tokens(shape["vocab_size"]),
        )
    ).eval()  # fmt: skip


def end_tokens(vocab_size: int) -> list[int]:
    return list(range(1, 1 + vocab_size // 32))


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
    """transformers' continuous batching, kept alive between calls; one page holds a sequence, all requests fit."""
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


class VllmProcess:
    """The child that `generation_vllm.py` is; one per model."""

    def __init__(self, python: str, model: PreTrainedModel, stack: ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model.save_pretrained(folder)
        script = Path(__file__).with_name("generation_vllm.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(script), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        stack.callback(self._process.wait, 60)
        stack.callback(self._process.stdin.close)
        self.versions = self._reply()

    def side(self, model: PreTrainedModel, prompts: list[list[int]]) -> Side:
        request = {
            "prompts": prompts, "n": GROUP_SIZE, "max_tokens": MAX_TOKENS, "stop_token_ids": model.config.eos_token_id,
            "max_sequences": len(prompts) * GROUP_SIZE,
        }  # fmt: skip

        def side() -> tuple[float, int]:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._reply()
            return reply["cpu_s"], reply["num_tokens"]

        return side

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the vLLM process ended with exit code {self._process.wait(60)}")
        return json.loads(line)


def compare(
    size: str, num_sequences: int, *, repeats: int, vllm: VllmProcess | None, stack: ExitStack
) -> dict[str, Any]:
    vocab_size = SHAPES[size]["vocab_size"]
    prompts = build_prompts(num_sequences // GROUP_SIZE, vocab_size=vocab_size)
    sides = {
        "engine": engine_side(build_model(size), prompts, stack),
        "generate": generate_side(build_model(size), prompts),
        "continuous_batching": continuous_side(build_model(size), prompts, stack),
    }
    if vllm is not None:
        sides["vllm"] = vllm.side(build_model(size), prompts)
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
    model = build_model(size)
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


def gemm_rate() -> float:
    """FLOPs per second of a square matrix product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / fastest(lambda: left @ right)


def fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine()),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 256], help="running together, each")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM")
    parser.add_argument("--out", help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    began, results, versions = machine(), [], {}
    for size in arguments.models:
        with ExitStack() as process:
            python = arguments.vllm_python
            vllm = VllmProcess(python, build_model(size), process) if python else None
            versions = vllm.versions if vllm else {}
            for count in arguments.sequences:
                with ExitStack() as stack:
                    results.append(compare(size, count, repeats=arguments.repeats, vllm=vllm, stack=stack))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = {
        "benchmark": "generation",
        "date": time.strftime("%Y-%m-%d"),
        "machine": began,
        "vllm": versions,
        "repeats": arguments.repeats,
        "results": results,
    }
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
