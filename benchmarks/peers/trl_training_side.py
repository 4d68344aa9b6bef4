"""The TRL side of `training_side.py`: GRPOTrainer's training step on given completions. Imports nothing of Sluice.

Legend: B = sequences, P = prompt tokens, T = completion tokens.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from benchmarks.shared.training_batch import ADAMW, GROUP_SIZE, MAX_GRAD_NORM, WEIGHT_DECAY, Sequence, Step


def trl_side(model: Any, batches: dict[str, list[Sequence]], *, device: str, budget: int) -> tuple[Step, float]:
    """GRPOTrainer.training_step, then its clip and optimizer; and the share of pads in the ragged batch.

    The logprobs of sampling are the step's own, as TRL takes them on policy; gradient checkpointing, its default, is off.
    """
    logging.disable(logging.WARNING)
    plans = {kind: _trl_batches(rows, device=device, budget=budget) for kind, rows in batches.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"P": 0, "U": 1, "E": 2}, unk_token="U")),
        pad_token="P", unk_token="U", eos_token="E",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=device == "cpu", bf16=device != "cpu", report_to="none", num_generations=GROUP_SIZE,
            per_device_train_batch_size=GROUP_SIZE, beta=0.0, loss_type="dapo", gradient_checkpointing=False,
            learning_rate=ADAMW["lr"], adam_beta1=ADAMW["betas"][0], adam_beta2=ADAMW["betas"][1],
            adam_epsilon=ADAMW["eps"], weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=[lambda completions, **_: [0.0]], args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        )  # fmt: skip
    trainer._prepare_inputs = lambda inputs: inputs  # which would sample
    trainer.create_optimizer()

    def step(kind: str) -> float:
        trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = len(plans[kind])
        for inputs in plans[kind]:
            trainer.training_step(trainer.model, inputs, inputs["num_items_in_batch"])
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    masks = [inputs[name] for inputs in plans["ragged"] for name in ("prompt_mask", "completion_mask")]
    return step, 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _trl_batches(rows: list[Sequence], *, device: str, budget: int) -> list[dict[str, Tensor]]:
    """Prompts padded on the left, completions on the right, to the longest of the step; as many rows as the budget holds."""
    widths = [max(len(part) for part in parts) for parts in zip(*((r.prompt, r.completion) for r in rows), strict=True)]
    ids = [torch.zeros(len(rows), width, dtype=torch.long) for width in widths]
    masks = [torch.zeros_like(x) for x in ids]
    for i, row in enumerate(rows):
        for x, values in ((ids[0], row.prompt), (masks[0], np.ones_like(row.prompt))):
            x[i, widths[0] - len(values) :] = torch.from_numpy(values)
        for x, values in ((ids[1], row.completion), (masks[1], np.ones_like(row.completion))):
            x[i, : len(values)] = torch.from_numpy(values)
    whole = {"prompt_ids": ids[0], "prompt_mask": masks[0], "completion_ids": ids[1], "completion_mask": masks[1]}
    whole["advantages"] = torch.tensor([row.advantage for row in rows])
    size = max(1, budget // sum(widths))
    return [
        {
            **{name: x[i : i + size].to(device) for name, x in whole.items()},
            "num_items_in_batch": masks[1].sum().to(device),
        }
        for i in range(0, len(rows), size)
    ]
