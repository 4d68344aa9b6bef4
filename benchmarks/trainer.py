"""One optimizer step of the trainer against the bare PyTorch one, packed against padded, and against TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python benchmarks/trainer.py --trl-python VENV/bin/python --out benchmarks/results/trainer.json
    python benchmarks/trainer.py --device cuda --sizes qwen3-0.6b qwen3-1.7b --out benchmarks/results/trainer_gpu.json

Random weights of a Qwen3; every side (`trainer_side.py`) is a process of its own that trains the same weights on the same
sequences, in float32 with one thread on a CPU, in bfloat16 autocast on a GPU. On a CPU all take turns, in CPU seconds of the
process, so that other load on the machine moves them all; on a GPU they run one after another, in wall seconds. The first
gradient norms of all sides must agree: they do the same work.

* `equal`: sequences of one length, so that nobody has a pad. `bare` is forward, cross-entropy at the completion tokens weighted
  by advantage, backward, clip, AdamW, and no metrics; `sluice` is `train_on`, all that the loop does with a batch of groups.
* `ragged`: log-normal completion lengths (sigma 0.8, median a fifth of the bound). `sluice` packs, `sluice_padded` does not;
  `trl` pads as it does, to the longest of the step, in micro-batches that hold as many tokens, pads counted, as ours.

Reported per side: median seconds, share of pads in what runs, tokens per second (pads are none), peak memory over that of the
weights (gradients, AdamW's state, activations), `flop_share`: the step's own FLOPs (6 per weight and token in a matrix
product, the head at completion tokens only, causal attention) over those of a large matrix product in the same time; and the
median and the range of the paired ratios sluice / side. Besides: the share of the step that entropy costs, and the publication
of a version in bfloat16, whole and as a delta, through a directory in memory, in wall seconds. Without --trl-python TRL is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from generation import gemm_rate, machine
from report import publish
from trainer_side import SHAPES

STEP_TOKENS = {"cpu": 4096, "cuda": 32768}
SIDES = {"equal": ("sluice", "bare", "trl"), "ragged": ("sluice", "sluice_padded", "trl")}
Reply = dict[str, Any]


class SideProcess:
    """A child that is one side; it lives as long as the stack."""

    def __init__(self, side: str, *, python: str, job: dict[str, Any], stack: ExitStack) -> None:
        script = str(Path(__file__).with_name("trainer_side.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._side = side
        self._process = subprocess.Popen(
            [python, script, json.dumps({**job, "side": side})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        stack.callback(self._process.wait, 60)
        stack.callback(self._process.stdin.close)
        self.hello = self._reply()

    def ask(self, do: str, **request: Any) -> Reply:
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Reply:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._side} side ended with exit code {self._process.wait(60)}")
        return json.loads(line)


def run_sides(sides: dict[str, SideProcess], *, rounds: int) -> dict[str, Reply]:
    """Steps of all sides in turns; per batch and side the seconds of each round, the first gradient norm, the peak memory."""
    runs: dict[str, Reply] = {}
    for kind, names in SIDES.items():
        taking_part = [name for name in names if name in sides]
        runs[kind] = {}
        for name in taking_part:
            first = sides[name].ask("step", batch=kind)
            runs[kind][name] = {**first, **sides[name].ask("memory", batch=kind), "rounds": []}
        for turn in range(rounds):
            for name in taking_part[:: 1 if turn % 2 == 0 else -1]:
                if "error" not in runs[kind][name]:
                    runs[kind][name]["rounds"].append(sides[name].ask("step", batch=kind)["s"])
    return runs


def measure(size: str, arguments: argparse.Namespace) -> Reply:
    """All sides at one size."""
    job = {"size": size, "device": arguments.device, "step_tokens": arguments.step_tokens}
    pythons = {"sluice": sys.executable, "sluice_padded": sys.executable, "bare": sys.executable}
    if arguments.trl_python:
        pythons["trl"] = arguments.trl_python
    together = [list(pythons)] if arguments.device == "cpu" else [[name] for name in pythons]
    runs: dict[str, Reply] = {kind: {} for kind in SIDES}
    hello, versions, extras = {}, {}, {}
    for names in together:
        with ExitStack() as stack:
            sides = {name: SideProcess(name, python=pythons[name], job=job, stack=stack) for name in names}
            for kind, found in run_sides(sides, rounds=arguments.rounds).items():
                runs[kind] |= {
                    name: {**run, "pad_share": sides[name].hello["pad_share"][kind]} for name, run in found.items()
                }
            versions |= {name: side.hello["versions"] for name, side in sides.items()}
            if "sluice" in sides:
                hello = sides["sluice"].hello
                extras = measure_extras(sides["sluice"], rounds=arguments.rounds)
    check_same_work(
        {name: run["grad_norm"] for name, run in runs["equal"].items() if "grad_norm" in run}, arguments.device
    )
    speed = gemm_rate() if arguments.device == "cpu" else gpu_gemm_rate()
    entropy_s = extras.pop("entropy_s")
    return {
        "model": size,
        "parameters": hello["parameters"],
        "gemm_tflop_per_s": round(speed / 1e12, 3),
        "batches": {
            kind: summarise(runs[kind], hello["batches"][kind], flops=step_flops(size, hello, kind), speed=speed)
            for kind in SIDES
        },
        "entropy_share_of_step": round(entropy_s / median(runs["equal"]["sluice"]["rounds"]), 4),
        **extras,
        "versions": versions,
    }


def measure_extras(sluice: SideProcess, *, rounds: int) -> Reply:
    """What entropy costs a step, and what the publication of a version costs."""
    entropy = [sluice.ask("entropy", batch="equal") for _ in range(1 + rounds)][1:]
    published = []
    for version in (0, 1):
        sluice.ask("step", batch="equal")
        published.append(sluice.ask("publish", version=version))
    return {
        "entropy_s": median(pair["with"] - pair["without"] for pair in entropy),
        "publish": {name: rounded(found) for name, found in zip(("whole", "delta"), published, strict=True)},
    }


def check_same_work(norms: dict[str, float], device: str) -> None:
    """Raises RuntimeError where the sides' first gradients differ."""
    if max(norms.values()) - min(norms.values()) > (1e-3 if device == "cpu" else 5e-2) * max(norms.values()):
        raise RuntimeError(f"the sides do not do the same work, their first gradients have norms {norms}")


def summarise(runs: dict[str, Reply], batch: Reply, *, flops: float, speed: float) -> Reply:
    """Of one batch: its sizes, what each side took, and the ratios to ours."""
    done = {name: run["rounds"] for name, run in runs.items() if run["rounds"]}
    found = {
        name: {
            "s": round(median(rounds), 4),
            "pad_share": round(runs[name]["pad_share"], 3),
            "tokens_per_s": round(batch["tokens"] / median(rounds)),
            "flop_share": round(flops / median(rounds) / speed, 3),
            "peak_mb_over_weights": round(runs[name]["peak_bytes"] / 1e6, 1),
        }
        for name, rounds in done.items()
    }
    pairs = {name: sorted(a / b for a, b in zip(done["sluice"], rounds, strict=True)) for name, rounds in done.items()}
    return {
        **batch,
        "sides": found | {name: {"error": run["error"]} for name, run in runs.items() if "error" in run},
        "sluice_over": {name: round(median(found), 3) for name, found in pairs.items() if name != "sluice"},
        "sluice_over_range": {
            name: [round(found[0], 3), round(found[-1], 3)] for name, found in pairs.items() if name != "sluice"
        },
    }


def step_flops(size: str, hello: Reply, kind: str) -> float:
    """FLOPs of one optimizer step without recomputation: 6 per weight and token; causal attention 6 L H D sum(S^2)."""
    vocab, hidden, _, layers, heads, _, width = SHAPES[size]
    batch = hello["batches"][kind]
    body = hello["parameters"] - vocab * hidden
    products = 6.0 * (body * batch["tokens"] + vocab * hidden * batch["completion_tokens"])
    return products + 6.0 * layers * heads * width * batch["sum_of_squares"]


def gpu_gemm_rate() -> float:
    """FLOPs per second of a large bfloat16 matrix product on the GPU."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.monotonic()
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
        times.append((time.monotonic() - began) / 10)
    return 2 * 8192**3 / min(times)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["1M", "29M"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--step-tokens", type=int, help="about, of one optimizer step; default 4096 on a CPU, 32768 on a GPU"
    )
    parser.add_argument("--trl-python", help="Python of an environment with trl, accelerate and datasets")
    parser.add_argument("--out", help="also write the JSON to this file")
    arguments = parser.parse_args()
    arguments.step_tokens = arguments.step_tokens or STEP_TOKENS[arguments.device]
    torch.set_num_threads(1)
    began, results = machine(), []
    for size in arguments.sizes:
        results.append(measure(size, arguments))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = {
        "benchmark": "trainer",
        "date": time.strftime("%Y-%m-%d"),
        "machine": began | ({"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}),
        "settings": {name: getattr(arguments, name) for name in ("device", "rounds", "step_tokens")},
        "results": results,
    }
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
