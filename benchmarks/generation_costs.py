"""What interrupts or burdens the torch engine: one long row among short ones, and a policy swap.

    OMP_NUM_THREADS=1 python benchmarks/generation_costs.py

`long_row`: CPU milliseconds of a decode step of `--sequences` rows of about 64 tokens, without and with one row of
`--long` tokens among them, which runs in the same forward pass (`together`) or in one of its own (`apart`, what the engine
does). `smallest_pass` is a step of one short row: what a second pass costs at least.
`swap`: pause of the decode loop by a new policy while rows decode, beside one decode step and a plain copy of the weights.
Models are those of generation.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import numpy as np
import torch

from benchmarks.shared.models import build_model, fastest
from benchmarks.shared.processes import until
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.running_batch import RunningBatch

SHORT, STEPS, MAX_MODEL_LEN = 64, 8, 4096
SIZES = ("0.1M", "29M")
NEVER = 2**62


def request(name: str, *, n: int, prompt: int, max_tokens: int) -> GenerationRequest:
    ids = np.random.default_rng(0).integers(3, 300, prompt).astype(np.int32)
    return GenerationRequest(group_id=name, prompt_ids=ids, sampling=SamplingParams(n=n, max_tokens=max_tokens))


@torch.inference_mode()
def step_ms(size: str, *, short: int, long: int, split_saves: int | None = None) -> float:
    """Fastest of some decode steps of `short` short rows and one of `long` tokens (0 = none)."""
    batch = RunningBatch(build_model(size), eos_token_ids=(), max_sequences=short + 1, max_model_len=MAX_MODEL_LEN)
    if split_saves is not None:
        batch._split_saves = split_saves
    groups = [SequenceGroup(request=request("short", n=short, prompt=SHORT, max_tokens=2 * STEPS + 2))]
    if long:
        groups.append(SequenceGroup(request=request("long", n=1, prompt=long, max_tokens=2 * STEPS + 2)))
    for group in groups:
        batch.admit([group], version=0)
    return ms(fastest(batch.step, repeats=STEPS))


def long_row(size: str, *, sequences: int, long: int) -> dict[str, Any]:
    return {
        "model": size,
        "rows": sequences,
        "long_tokens": long,
        "step_ms": {
            "smallest_pass": step_ms(size, short=1, long=0),
            "short_only": step_ms(size, short=sequences - 1, long=0),
            "together": step_ms(size, short=sequences - 1, long=long, split_saves=NEVER),
            "apart": step_ms(size, short=sequences - 1, long=long),
        },
    }


def swap(size: str, *, sequences: int, swaps: int) -> dict[str, Any]:
    """Pauses of swaps while `sequences` rows decode; wall clock."""
    model = build_model(size)
    policies = [{name: w.detach().clone() for name, w in named_weights(build_model(size)).items()} for _ in range(2)]
    engine = TorchEngine(model, eos_token_ids=(), max_sequences=sequences, max_model_len=MAX_MODEL_LEN)
    engine.stage(0, "0", policies[0])
    pauses: list[float] = []
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(engine.generate, request("rows", n=sequences, prompt=SHORT, max_tokens=10 * swaps))
        for version in range(1, swaps + 1):
            until(
                lambda: engine.stats().generated_tokens >= sequences * (5 * len(pauses) + 1), "tokens", period_s=0.001
            )
            engine.stage(version, str(version), policies[version % 2])
            until(lambda: engine.stats().num_updates > version, "a swap", period_s=0.001)  # noqa: B023
            pauses.append(engine.stats().last_pause_s)
        running.result(600)
    stats = engine.stats()
    engine.close()
    weights = list(named_weights(model).values())

    def copy() -> None:
        for weight, new in zip(weights, policies[0].values(), strict=True):
            weight.data.copy_(new)

    return {
        "model": size,
        "rows": sequences,
        "pause_ms": {"median": ms(statistics.median(pauses)), "max": ms(max(pauses))},
        "decode_step_ms": ms((stats.busy_s) / (stats.generated_tokens / sequences)),
        "plain_copy_ms": ms(fastest(copy, clock=time.monotonic)),
        "weights_mib": round(sum(w.nbytes for w in weights) / 2**20, 1),
    }


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--swaps", type=int, default=6)
    quick = {"models": ["0.1M"], "sequences": 16, "long": 128, "swaps": 2}
    arguments = parse(parser, argv, quick=quick)
    torch.set_num_threads(1)
    sizes, rows = arguments.models, arguments.sequences
    found = {
        "long_row": [long_row(size, sequences=rows, long=arguments.long) for size in sizes],
        "swap": [swap(size, sequences=min(rows, 32), swaps=arguments.swaps) for size in sizes],
    }
    publish("generation_costs", arguments, found)


if __name__ == "__main__":
    main()
