"""One optimizer step of the trainer against the bare PyTorch one, packed against padded, and against TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --trl-python VENV/bin/python
    python benchmarks/training_step.py --device cuda --sizes qwen3-0.6b qwen3-1.7b

Random weights of a Qwen3; every side (`peers/training_side.py`) is a process of its own that trains the same weights on the same
sequences, in float32 with one thread on a CPU, in bfloat16 autocast on a GPU. On a CPU all take turns, in CPU seconds of the
process, so that other load on the machine moves them all; on a GPU they run one after another, in wall seconds. The first
gradient norms of all sides must agree: they do the same work.

* `equal`: sequences of one length, so that none has a pad. `bare` is forward, cross-entropy at the completion tokens weighted
  by advantage, backward, clip, AdamW, and no metrics; `sluice` is `train_on`, all that the loop does with a batch of groups.
* `ragged`: log-normal completion lengths (sigma 0.8, median a fifth of the bound). `sluice` packs, `sluice_padded` does not;
  `trl` pads as it does, to the longest of the step, in micro-batches that hold as many tokens, pads counted, as ours.

Reported per side: median seconds, share of pads in what runs, tokens per second (pads are none), peak memory over that of the
weights (gradients, AdamW's state, activations), `flop_share`: the step's own FLOPs (6 per weight and token in a matrix
product, the head at completion tokens only, causal attention) over those of a large matrix product in the same time; and the
median and the range of the paired ratios sluice / side. TRL is left out where --trl-python cannot import it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import torch

from benchmarks.shared.models import SHAPES, gemm_rate
from benchmarks.shared.processes import PeerProcess, missing
from benchmarks.shared.report import new_parser, parse, publish

STEP_TOKENS = {"cpu": 4096, "cuda": 32768}
SIDES = {"equal": ("sluice", "bare", "trl"), "ragged": ("sluice", "sluice_padded", "trl")}
Reply = dict[str, Any]


def run_sides(sides: dict[str, PeerProcess], *, rounds: int) -> dict[str, Reply]:
    """Run steps of all sides in turns; per batch and side the seconds of each round, the first gradient norm, the peak memory."""
    runs: dict[str, Reply] = {}
    for kind, names in SIDES.items():
        taking_part = [name for name in names if name in sides]
        runs[kind] = {}
        for name in taking_part:
            first = sides[name].ask(do="step", batch=kind)
            runs[kind][name] = {**first, **sides[name].ask(do="memory", batch=kind), "rounds": []}
        for turn in range(rounds):
            for name in taking_part[:: 1 if turn % 2 == 0 else -1]:
                if "error" not in runs[kind][name]:
                    runs[kind][name]["rounds"].append(sides[name].ask(do="step", batch=kind)["s"])
    return runs


def measure(size: str, arguments: argparse.Namespace) -> Reply:
    """All sides at one size."""
    job = {"size": size, "device": arguments.device, "step_tokens": arguments.step_tokens}
    pythons = {"sluice": sys.executable, "sluice_padded": sys.executable, "bare": sys.executable}
    if arguments.trl_python:
        pythons["trl"] = arguments.trl_python
    together = [list(pythons)] if arguments.device == "cpu" else [[name] for name in pythons]
    runs: dict[str, Reply] = {kind: {} for kind in SIDES}
    hello: Reply = {}
    versions: Reply = {}
    for names in together:
        with ExitStack() as stack:
            sides = {
                name: PeerProcess("training_side", json.dumps({**job, "side": name}), python=pythons[name], stack=stack)
                for name in names
            }
            for kind, found in run_sides(sides, rounds=arguments.rounds).items():
                runs[kind] |= {
                    name: {**run, "pad_share": sides[name].hello["pad_share"][kind]} for name, run in found.items()
                }
            versions |= {name: side.hello["versions"] for name, side in sides.items()}
            if "sluice" in sides:
                hello = sides["sluice"].hello
    check_same_work(
        {name: run["grad_norm"] for name, run in runs["equal"].items() if "grad_norm" in run}, arguments.device
    )
    speed = gemm_rate(arguments.device)
    return {
        "model": size,
        "parameters": hello["parameters"],
        "gemm_tflop_per_s": round(speed / 1e12, 3),
        "batches": {
            kind: summarise(runs[kind], hello["batches"][kind], flops=step_flops(size, hello, kind), speed=speed)
            for kind in SIDES
        },
        "versions": versions,
    }


def check_same_work(norms: dict[str, float], device: str) -> None:
    """Raise RuntimeError where the sides' first gradients differ."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["1M", "29M"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-tokens", type=int, help="about, of one step; default 4096 on a CPU, 32768 on a GPU")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment with trl and accelerate")
    arguments = parse(parser, argv, quick={"sizes": ["0.1M"], "rounds": 1, "step_tokens": 1024})
    arguments.step_tokens = arguments.step_tokens or STEP_TOKENS[arguments.device]
    torch.set_num_threads(1)
    absent = missing("trl", arguments.trl_python)
    arguments.trl_python = None if absent else arguments.trl_python
    results = [measure(size, arguments) for size in arguments.sizes]
    arguments.trl_python = None  # a path of this machine
    name = "training_step" + "_cuda" * (arguments.device == "cuda")
    publish(name, arguments, {"missing": [absent] if absent else [], "results": results})


if __name__ == "__main__":
    main()
