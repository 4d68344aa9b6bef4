"""TRL's own numbers, for tests/test_trl_agreement.py: loss and gradient of its trainers on one fixed batch, in float64.

    python benchmarks/trl_numbers.py > tests/fixtures/trl_numbers.json      # in an environment with trl==1.16.0 and torch

Every case is a real GRPOTrainer (or RLOOTrainer) of the arguments that stand in it. Only what would need a sampler or a
large model is replaced: generation, the reward functions' scores, and the logprobs of policy, old policy and reference.
Advantages, masks, importance weights and loss are computed by TRL's `_generate_and_score_completions` and `_compute_loss`.

Legend: B = sequences, T = completion tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

EOS = 2
GROUP_SIZE = 4
LENGTHS = (6, 3, 5, 1, 4, 6, 2, 5)
"""Two groups of four completions."""
TRUNCATED = (1, 5)
"""Sequences that do not end with the end token."""
REWARDS = (1.0, 0.0, 0.5, 0.25, 0.0, 2.0, 0.0, 1.0)
HORIZON = 10
KL = {"beta": 0.3, "use_bias_correction_kl": False}
VLLM = {"vllm_importance_sampling_correction": True, "use_vllm": True}

CASES: dict[str, dict[str, Any]] = {
    # aggregations
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    # losses
    "two_sided": {"loss_type": "grpo", "delta": 1.3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "sapo_temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    "gspo_of_the_paper": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
    },
    "gspo_two_sided": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "delta": 1.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    # KL to the reference
    **{f"kl_{loss}": {"loss_type": loss, **KL} for loss in ("grpo", "dapo", "dr_grpo", "cispo", "sapo")},
    "kl_gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, **KL},
    "kl_bias_correction": {"loss_type": "dapo", "beta": 0.3},
    # advantages
    "scale_batch": {"loss_type": "dapo", "scale_rewards": "batch"},
    "scale_none": {"loss_type": "dapo", "scale_rewards": "none"},
    # the correction for the sampler
    "token_truncate": {"loss_type": "dapo", **VLLM, "vllm_importance_sampling_mode": "token_truncate",
                       "vllm_importance_sampling_clip_max": 1.1},
    "token_mask": {"loss_type": "dapo", **VLLM, "vllm_importance_sampling_mode": "token_mask",
                   "vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.2},
    "sequence_truncate": {"loss_type": "grpo", **VLLM, "vllm_importance_sampling_mode": "sequence_truncate",
                          "vllm_importance_sampling_clip_max": 1.1},
    "sequence_mask": {"loss_type": "grpo", **VLLM, "vllm_importance_sampling_mode": "sequence_mask",
                      "vllm_importance_sampling_clip_max": 1.2},
    "sequence_mask_dr_grpo": {"loss_type": "dr_grpo", **VLLM, "vllm_importance_sampling_mode": "sequence_mask",
                              "vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.5},
    "cispo_token_mask": {"loss_type": "cispo", "epsilon_high": 1.2, **VLLM, **KL,
                         "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.1},
    "sapo_token_truncate": {"loss_type": "sapo", **VLLM, "vllm_importance_sampling_mode": "token_truncate",
                            "vllm_importance_sampling_clip_max": 1.1},
    "gspo_sequence_truncate": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, **VLLM,
                               "vllm_importance_sampling_mode": "sequence_truncate",
                               "vllm_importance_sampling_clip_max": 1.1},
    # masks
    "truncated_dapo": {"loss_type": "dapo", "mask_truncated_completions": True},
    "truncated_grpo": {"loss_type": "grpo", "mask_truncated_completions": True},
    "truncated_dr_grpo": {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    "tools_dapo": {"loss_type": "dapo", "tools": True},
    "tools_gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "tools": True},
    "tools_sequence_mask": {"loss_type": "grpo", **VLLM, "vllm_importance_sampling_mode": "sequence_mask",
                            "vllm_importance_sampling_clip_max": 1.2, "tools": True},
    "unscorable_dapo": {"loss_type": "dapo", "unscorable": True},
    # leave-one-out
    "rloo": {"rloo": True},
    "rloo_unscorable": {"rloo": True, "unscorable": True},
}  # fmt: skip
"""Arguments of GRPOConfig, and three that are none: tools (some tokens are tool output), unscorable (one reward is none),
rloo (RLOOTrainer)."""


def draw_batch() -> dict[str, Any]:
    """Logprobs [B, T] of the four policies, near each other, so that some tokens are clipped or masked and others not."""
    draw = torch.Generator().manual_seed(20261126)
    shape = (len(LENGTHS), max(LENGTHS))
    policy = -2 * torch.rand(shape, generator=draw) - 0.3
    near = {name: policy + 0.2 * torch.randn(shape, generator=draw) for name in ("old", "sampler", "reference")}
    logprobs = {"policy": policy, **near}
    tool_mask = torch.ones(shape)
    tool_mask[0, 1:3] = tool_mask[2, 4:] = tool_mask[5, 0] = 0
    return {
        "group_size": GROUP_SIZE,
        "lengths": LENGTHS,
        "truncated": TRUNCATED,
        "rewards": REWARDS,
        "horizon": HORIZON,
        "tool_mask": tool_mask.int().tolist(),
        "logprobs": {name: values.clamp(max=-0.01).tolist() for name, values in logprobs.items()},
    }


def build_trainer(folder: str, settings: dict[str, Any]) -> Any:
    """A trainer of the settings, over a model of a few hundred weights."""
    vocabulary = {letter: index for index, letter in enumerate("PUEabc")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="U")),
        pad_token="P", unk_token="U", eos_token="E",
    )  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, eos_token_id=EOS, pad_token_id=0,
        )
    )  # fmt: skip
    is_rloo = settings.get("rloo", False)
    config = (RLOOConfig if is_rloo else GRPOConfig)(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(LENGTHS),
        num_generations=GROUP_SIZE,
        max_completion_length=HORIZON,
        **({} if is_rloo else {"num_iterations": 2}),  # then the loss keeps the old policy's logprobs
        beta=0.0,
        **{k: v for k, v in settings.items() if k not in ("tools", "unscorable", "rloo", "use_vllm", "beta")},
    )
    rows = Dataset.from_dict({"prompt": ["a"] * len(LENGTHS)})
    trainer = (RLOOTrainer if is_rloo else GRPOTrainer)(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0]],
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    # set late, so that no server is started and no reference model is loaded; what they cause is computed all the same
    trainer.use_vllm = settings.get("use_vllm", False)
    trainer.beta = settings.get("beta", 0.0)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def run_case(settings: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    """TRL's advantages, loss, and gradient of the loss at the policy's logprobs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, settings)
    logprobs = {name: torch.tensor(values) for name, values in batch["logprobs"].items()}
    if settings.get("rloo"):
        logprobs["old"] = logprobs["policy"].clone()  # on-policy: what the leave-one-out estimator is defined for
    policy = logprobs["policy"].requires_grad_()
    by_model = {id(trainer.model): logprobs["old"]}
    if trainer.beta:
        trainer.ref_model = SimpleNamespace()
        by_model[id(trainer.ref_model)] = logprobs["reference"]

    def scores(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        values = by_model.get(id(model), policy)
        return values, torch.zeros_like(values), None

    ids = [[3] * (n - 1) + [3 if i in batch["truncated"] else EOS] for i, n in enumerate(LENGTHS)]
    prompts = [[3]] * len(LENGTHS)
    sampled = [row[:n] for row, n in zip(batch["logprobs"]["sampler"], LENGTHS, strict=True)]
    tools = [row[:n] for row, n in zip(batch["tool_mask"], LENGTHS, strict=True)] if settings.get("tools") else None
    rewards = torch.tensor(batch["rewards"]).unsqueeze(-1)
    if settings.get("unscorable"):
        rewards[2] = torch.nan
    trainer._get_per_token_logps_and_entropies = scores
    trainer._calculate_rewards = lambda *_: rewards
    texts = [""] * len(LENGTHS)
    if settings.get("rloo"):
        trainer._generate = lambda _: (prompts, ids, texts)
    else:
        trainer._generate = lambda _: (prompts, ids, tools, texts, sampled, {}, None, None)
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * len(LENGTHS))
    loss = trainer._compute_loss(SimpleNamespace(), inputs)
    loss.backward()
    return {
        "trl": settings,
        "advantages": inputs["advantages"].tolist(),
        "loss": loss.item(),
        "gradient": policy.grad.tolist(),
    }


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    batch = draw_batch()
    lengths = [0, 60, 79, 80, 81, 90, 99, 100]
    punishment = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    numbers: dict[str, Any] = {
        "made_by": "python benchmarks/trl_numbers.py > tests/fixtures/trl_numbers.json",
        "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
        "batch": batch,
        "cases": {name: run_case(settings, batch) for name, settings in CASES.items()},
        "overlong": {"lengths": lengths, "rewards": punishment([[0] * length for length in lengths])},
    }
    cases = numbers.pop("cases")
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in numbers.items()]
    of_cases = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in cases.items())
    sys.stdout.write("{\n" + ",\n".join([*lines, '"cases": {\n' + of_cases + "\n}"]) + "\n}\n")


if __name__ == "__main__":
    main()
