"""LoRA: what a worker pays to merge an adapter, and how much of a small adapter is left after rounding.

    OMP_NUM_THREADS=1 python benchmarks/lora.py        (needs `sluice-rl[lora]`)

* merge: the weights of Qwen3-0.6B's shapes in bfloat16 and an adapter of rank 16 for all linear layers: bytes of both, CPU
  seconds of one thread for `merge_adapter` (best of `--repeats`), beside a copy of all weights;
* rounding: a random Qwen3 of 10 M parameters whose weights are bfloat16 numbers is trained on random batches with an adapter
  of rank 16 and alpha 32; after that many optimizer steps its merged weights, rounded, score the canary (in float32, so that
  nothing but the weights is rounded): the share of the adapter's effect that is left, its standard error, and the mean
  distance from the trainer's logprobs in nats.

Needs 4 GB of memory and three minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import torch

from benchmarks.shared.models import SHAPES, build_model, fastest
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.models.causal_lm import load_weights, named_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.models.lora import PREFIX, merge_adapter
from sluice.common.policies.canary import adapter_share, mean_difference, random_sequences
from sluice.trainer.micro_batches import MicroBatch
from sluice.trainer.trained_policy import TrainedPolicy
from tests.builders import make_config

RANK, ALPHA = 16, 32.0


def measure_merge(size: str, *, repeats: int) -> dict[str, float]:
    with torch.device("meta"):
        model = build_model(size)
    weights = {n: (0.02 * torch.randn(w.shape)).bfloat16() for n, w in named_weights(model).items()}
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            adapter[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(RANK, module.in_features)
            adapter[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(module.out_features, RANK)
    return {
        "num_parameters": sum(weight.numel() for weight in weights.values()),
        "full_bytes": sum(weight.nbytes for weight in weights.values()),
        "adapter_bytes": sum(tensor.nbytes for tensor in adapter.values()),
        "merge_cpu_s": fastest(lambda: merge_adapter(weights, adapter, scale=2.0), repeats=repeats),
        "copy_cpu_s": fastest(lambda: [weight.clone() for weight in weights.values()], repeats=repeats),
    }


def micro_batch(seed: int, *, vocab_size: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    return MicroBatch(
        input_ids=torch.randint(0, vocab_size, (4, 24), generator=generator),
        prompt_lengths=torch.full((4,), 8),
        completion_lengths=torch.full((4,), 16),
        rollout_logprobs=-6.2 + 0.1 * torch.rand(4, 16, generator=generator),
        ref_logprobs=None,
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        loss_mask=torch.ones(4, 16, dtype=torch.bool),
    )


def measure_rounding(size: str, *, learning_rate: float, steps: list[int]) -> list[dict[str, Any]]:
    base, vocab_size = build_model(size).bfloat16().float().eval(), SHAPES[size][0]
    trainer = {"lora": {"rank": RANK, "alpha": ALPHA}, "learning_rate": learning_rate, "warmup_steps": 0}
    policy = TrainedPolicy.of_run(deepcopy(base), make_config(trainer={**trainer, "weight_decay": 0.0}))
    found = []
    for step in range(1, max(steps) + 1):
        policy.optimize([micro_batch(step, vocab_size=vocab_size)], step=step)
        if step not in steps:
            continue
        canary = policy.score(random_sequences(vocab_size))
        sequences = [(sequence.prompt_ids, sequence.token_ids) for sequence in canary]
        row: dict[str, Any] = {"learning_rate": learning_rate, "step": step}
        row["effect"] = mean_difference([s.logprobs for s in canary], [s.base_logprobs for s in canary])  # type: ignore[misc]
        for dtype in ("bfloat16", "float16"):
            weights = policy.snapshot(getattr(torch, dtype), full=True)
            sampler = deepcopy(base)
            load_weights(sampler, merge_adapter(weights, policy.snapshot(torch.float32), scale=ALPHA / RANK))
            with torch.no_grad():
                logprobs = score_sequences(sampler, sequences, max_batch_tokens=4096)
            share, error = adapter_share(canary, logprobs) or (float("nan"), float("nan"))
            row[dtype] = {
                "share": round(share, 3),
                "error": round(error, 3),
                "off": mean_difference([s.logprobs for s in canary], logprobs),
            }
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--merge-size", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--size", choices=list(SHAPES), default="10M", help="of the model whose rounding is measured")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--repeats", type=int, default=3)
    quick = {"merge_size": "1M", "size": "1M", "lr": [1e-4], "steps": [1, 2], "repeats": 1}
    arguments = parse(parser, argv, quick=quick)
    torch.set_num_threads(1)
    size, steps = arguments.size, arguments.steps
    found = {
        "merge": measure_merge(arguments.merge_size, repeats=arguments.repeats),
        "rounding": [row for lr in arguments.lr for row in measure_rounding(size, learning_rate=lr, steps=steps)],
    }
    publish("lora", arguments, found)


if __name__ == "__main__":
    main()
