"""What interrupts or burdens the torch engine: one long row among short ones, and a policy swap.

    OMP_NUM_THREADS=1 python benchmarks/generation_costs.py --out benchmarks/results/generation_costs.json

`long_row`: CPU milliseconds of a decode step of `--sequences` rows of about 64 tokens, without and with one row of
`--long` tokens among them, which runs in the same forward pass (`together`) or in one of its own (`apart`, what the engine
does). `smallest_pass` is a step of one short row: what a second pass costs at least.
`memory`: what a process grows by for the keys and values of `--sequences` rows of 64 tokens and one of `--longest`: admitted in
one prefill pass (`together`), the long one later (`beside`), and after rows of 128, 256, ... tokens came and went (`stepwise`).
`swap`: pause of the decode loop by a new policy while rows decode, beside one decode step and a plain copy of the weights.
Models are those of generation.py. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from generation import SHAPES, build_model, machine
from report import publish

from sluice.common.models.causal_lm import named_weights
from sluice.common.types import SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.kv_cache import bytes_per_token
from sluice.workers.engine.torch.running_batch import RunningBatch
from sluice.workers.engine.torch.sequence import SequenceGroup

SHORT, STEPS, MAX_MODEL_LEN = 64, 8, 4096
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
    times = []
    for _ in range(STEPS):
        started = time.process_time()
        batch.step()
        times.append(time.process_time() - started)
    return round(1000 * min(times), 2)


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


@torch.inference_mode()
def grown_mib(size: str, *, short: int, long: int, arrival: str) -> dict[str, float]:
    """Resident memory that the rows added, at the end and at the most; to be called in a fresh process."""
    torch.set_num_threads(1)
    model = build_model(size)
    model.base_model(
        input_ids=torch.ones(1, long, dtype=torch.long)
    )  # what a prefill pass needs beside is there before
    batch = RunningBatch(model, eos_token_ids=(), max_sequences=short + 1, max_model_len=MAX_MODEL_LEN)
    rows = SequenceGroup(request=request("short", n=short, prompt=SHORT - 2, max_tokens=1000))
    lengths = [2**k for k in range(7, long.bit_length())] if arrival == "stepwise" else [long]
    longs = [SequenceGroup(request=request("long", n=1, prompt=length - 2, max_tokens=1)) for length in lengths[:-1]]
    longs.append(SequenceGroup(request=request("long", n=1, prompt=long - 2, max_tokens=2)))
    before = resident_mib()
    for groups in [[rows, *longs]] if arrival == "together" else [[rows], *([group] for group in longs)]:
        batch.admit(groups, version=0)
        batch.step()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"at_the_end": round(resident_mib() - before), "at_the_most": round(most - before)}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory(size: str, *, sequences: int, long: int) -> dict[str, Any]:
    token_mib = bytes_per_token(build_model(size)) / 2**20
    grown = {}
    for arrival in ("together", "beside", "stepwise"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            grown[arrival] = fresh.submit(grown_mib, size, short=sequences, long=long, arrival=arrival).result(600)
    return {
        "model": size,
        "rows": sequences + 1,
        "long_tokens": long,
        "stored_mib": round((sequences * SHORT + long) * token_mib),
        "every_row_at_the_longest_mib": round((sequences + 1) * long * token_mib),
        "grown_mib": grown,
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
            wait_until(lambda: engine.stats().generated_tokens >= sequences * 5 * len(pauses) + sequences)
            engine.stage(version, str(version), policies[version % 2])
            wait_until(lambda: engine.stats().num_updates > version)  # noqa: B023
            pauses.append(engine.stats().last_pause_s)
        running.result(600)
    stats = engine.stats()
    engine.close()
    weights = list(named_weights(model).values())
    copies = []
    for _ in range(5):
        started = time.monotonic()
        for weight, new in zip(weights, policies[0].values(), strict=True):
            weight.data.copy_(new)
        copies.append(time.monotonic() - started)
    return {
        "model": size,
        "rows": sequences,
        "pause_ms": {"median": ms(statistics.median(pauses)), "max": ms(max(pauses))},
        "decode_step_ms": ms((stats.busy_s) / (stats.generated_tokens / sequences)),
        "plain_copy_ms": ms(min(copies)),
        "weights_mib": round(sum(w.nbytes for w in weights) / 2**20, 1),
    }


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "the engine stands still"
        time.sleep(0.001)


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the long row where memory is measured")
    parser.add_argument("--out", help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "benchmark": "generation_costs",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "long_row": [long_row(size, sequences=arguments.sequences, long=arguments.long) for size in SHAPES],
        "memory": [memory(size, sequences=arguments.sequences, long=arguments.longest) for size in SHAPES],
        "swap": [swap(size, sequences=32, swaps=6) for size in SHAPES],
    }
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
