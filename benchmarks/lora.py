"""LoRA: what a worker pays to merge an adapter, and how much of a small adapter is left after rounding.

    OMP_NUM_THREADS=1 python benchmarks/lora.py --out benchmarks/results/lora.json        (needs `sluice-rl[lora]`)

* merge: the weights of Qwen3-0.6B's shapes in bfloat16 and an adapter of rank 16 for all linear layers: bytes of both, CPU
  seconds of one thread for `merge_adapter` (best of `--repeats`), beside a copy of all weights;
* rounding: a random Qwen3 of 10 M parameters whose weights are bfloat16 numbers is trained on random batches with an adapter
  of rank 16 and alpha 32; after so many optimizer steps its merged weights, rounded, score the canary (in float32, so that
  nothing but the weights is rounded): the share of the adapter's effect that is left, its standard error, and the mean
  distance from the trainer's logprobs in nats.

Prints one JSON object. Needs 4 GB of memory and three minutes.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch
from builders import make_config
from report import publish
from transformers import Qwen3Config, Qwen3ForCausalLM

from sluice.common.models.causal_lm import load_weights, named_weights
from sluice.common.models.logprobs import score_sequences
from sluice.common.models.lora import PREFIX, merge_adapter
from sluice.common.policies.canary import adapter_share, mean_difference, random_sequences
from sluice.trainer.micro_batches import MicroBatch
from sluice.trainer.trained_policy import TrainedPolicy

RANK, ALPHA, VOCAB = 16, 32.0, 512


def cpu_s(work: Callable[[], object], *, repeats: int) -> float:
    """The best of several times."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def measure_merge(*, repeats: int) -> dict[str, float]:
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    weights = {n: (0.02 * torch.randn(w.shape)).bfloat16() for n, w in named_weights(model).items()}
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            adapter[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(RANK, module.in_features)
            adapter[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(module.out_features, RANK)
    return {
        "num_parameters": sum(weight.numel() for weight in weights.values()),
        "whole_bytes": sum(weight.nbytes for weight in weights.values()),
        "adapter_bytes": sum(tensor.nbytes for tensor in adapter.values()),
        "merge_cpu_s": cpu_s(lambda: merge_adapter(weights, adapter, scale=2.0), repeats=repeats),
        "copy_cpu_s": cpu_s(lambda: [weight.clone() for weight in weights.values()], repeats=repeats),
    }


def micro_batch(seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    return MicroBatch(
        input_ids=torch.randint(0, VOCAB, (4, 24), generator=generator),
        prompt_lengths=torch.full((4,), 8),
        completion_lengths=torch.full((4,), 16),
        rollout_logprobs=-6.2 + 0.1 * torch.rand(4, 16, generator=generator),
        ref_logprobs=None,
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        loss_mask=torch.ones(4, 16, dtype=torch.bool),
    )


def measure_rounding(*, learning_rate: float, steps: list[int]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config).bfloat16().float().eval()
    trainer = {"lora": {"rank": RANK, "alpha": ALPHA}, "learning_rate": learning_rate, "warmup_steps": 0}
    policy = TrainedPolicy.of_run(deepcopy(base), make_config(trainer={**trainer, "weight_decay": 0.0}))
    found = []
    for step in range(1, max(steps) + 1):
        policy.optimize([micro_batch(step)], step=step)
        if step not in steps:
            continue
        canary = policy.score(random_sequences(VOCAB))
        sequences = [(sequence.prompt_ids, sequence.token_ids) for sequence in canary]
        row: dict[str, Any] = {"learning_rate": learning_rate, "step": step}
        row["effect"] = mean_difference([s.logprobs for s in canary], [s.base_logprobs for s in canary])  # type: ignore[misc]
        for dtype in ("bfloat16", "float16"):
            weights = policy.snapshot(getattr(torch, dtype), full=True)
            sampler = deepcopy(base)
            load_weights(sampler, merge_adapter(weights, policy.snapshot(torch.float32), scale=ALPHA / RANK))
            with torch.no_grad():
                logprobs = score_sequences(sampler, sequences, max_batch_tokens=4096)
            shard, error = adapter_share(canary, logprobs) or (float("nan"), float("nan"))
            row[dtype] = {
                "shard": round(shard, 3),
                "error": round(error, 3),
                "off": mean_difference([s.logprobs for s in canary], logprobs),
            }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "merge": measure_merge(repeats=arguments.repeats),
        "rounding": [r for lr in arguments.lr for r in measure_rounding(learning_rate=lr, steps=arguments.steps)],
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
