"""Tokens per CPU second of the torch engine, beside `model.generate` on the same model and prompts.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --sequences 128 512 --repeats 7

The model is the quickstart's size with random weights (Qwen3 architecture, about 120 k parameters); twelve end
tokens of 384 give ragged ends. Both sides return tokens and what logprobs need; generate pads, the engine
retires. Sides alternate, because other load on the machine moves both; reported are the best of `--repeats` (load only
slows a run down) and the median of the paired ratios.
`arrival` is `at_once` (all sequences fit) or `queued` (eight times as many as `max_sequences`; generate takes them in
batches of that size). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from common.model import named_weights
from common.types import SamplingParams
from workers.engine import GenerationRequest
from workers.engine.torch_engine import TorchEngine

VOCAB, PAD, EOS = 384, 0, tuple(range(1, 13))
GROUP_SIZE, MAX_TOKENS, PROMPT_LENGTHS = 8, 40, (12, 18)


def build_model() -> PreTrainedModel:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=192, num_hidden_layers=2, tie_word_embeddings=True,
        initializer_range=0.08, max_position_embeddings=256, pad_token_id=PAD, eos_token_id=list(EOS), **heads,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def build_prompts(num_groups: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    low, high = PROMPT_LENGTHS
    return [rng.integers(len(EOS) + 1, VOCAB, rng.integers(low, high + 1)).astype(np.int32) for _ in range(num_groups)]


def engine_side(model: PreTrainedModel, prompts: list[np.ndarray], *, max_sequences: int) -> Callable[[], int]:
    """A call that generates all groups through the engine and returns the number of tokens."""
    engine = TorchEngine(model, eos_token_ids=EOS, max_sequences=max_sequences, max_model_len=128)
    engine.stage(0, "", {name: weight.detach().clone() for name, weight in named_weights(model).items()})
    threads = ThreadPoolExecutor(len(prompts))

    def generate(index: int) -> int:
        sampling = SamplingParams(n=GROUP_SIZE, max_tokens=MAX_TOKENS, seed=index)
        request = GenerationRequest(group_id=str(index), prompt_ids=prompts[index], sampling=sampling)
        return sum(len(completion.token_ids) for completion in engine.generate(request))

    return lambda: sum(threads.map(generate, range(len(prompts))))


def generate_side(model: Any, prompts: list[np.ndarray], *, max_sequences: int) -> Callable[[], int]:
    """The same through `model.generate` with its dynamic cache and the logits that logprobs would be taken from."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.from_numpy(prompt)
    batches = ids.repeat_interleave(GROUP_SIZE, 0).split(max_sequences)

    def generate(batch: torch.Tensor) -> int:
        output = model.generate(
            batch, attention_mask=(batch != PAD).long(), do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = output.sequences[:, width:]
        finished = torch.isin(new, torch.tensor(EOS)).int()
        return int((finished.cumsum(1) - finished == 0).sum())

    return lambda: sum(map(generate, batches))


def measure(side: Callable[[], int]) -> tuple[float, int]:
    """(tokens per CPU second, tokens) of one call."""
    started = time.process_time()
    num_tokens = side()
    return num_tokens / (time.process_time() - started), num_tokens


def compare(num_sequences: int, *, max_sequences: int, repeats: int) -> dict[str, Any]:
    model, prompts = build_model(), build_prompts(num_sequences // GROUP_SIZE)
    sides = {
        "engine": engine_side(model, prompts, max_sequences=max_sequences),
        "generate": generate_side(model, prompts, max_sequences=max_sequences),
    }
    for side in sides.values():
        side()  # warm-up
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(measure(side))
    ratios = [ours / theirs for (ours, _), (theirs, _) in zip(runs["engine"], runs["generate"], strict=True)]
    return {
        "sequences": num_sequences,
        "max_sequences": max_sequences,
        "arrival": "at_once" if num_sequences <= max_sequences else "queued",
        "mean_completion_tokens": {
            name: round(statistics.mean(tokens for _, tokens in run) / num_sequences, 1) for name, run in runs.items()
        },
        "tokens_per_cpu_s": {name: round(max(rate for rate, _ in run)) for name, run in runs.items()},
        "ratio": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512], help="measured at once, each")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(count, count) for count in arguments.sequences]
    cases.append((8 * arguments.sequences[0], arguments.sequences[0]))
    results = [compare(count, max_sequences=limit, repeats=arguments.repeats) for count, limit in cases]
    machine = {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"benchmark": "generation", "machine": machine, "results": results}, indent=2))


def processor() -> str:
    """The CPU's name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
