"""The peer that runs on a CPU: TRL's GRPOTrainer at the job that a specification describes.

    python -m benchmarks.peers.trl_quickstart SPEC.json WEIGHTS_FOLDER

Needs torch, trl and accelerate (`pip install 'sluice-rl[trl]'`), nothing of Sluice but its reward functions. Prints one
JSON line per optimizer step: step, wall_s and cpu_s since the first step began, reward. The weights of every step are
written to WEIGHTS_FOLDER/policy-<step>.safetensors; the time for that is taken off both clocks.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sluice.workers.rewards import MathReward, ThinkingReward

REWARDS = (MathReward(), ThinkingReward())


def math_reward(prompts: list[Any], completions: list[Any], target: list[str], **_: Any) -> list[float]:
    return [REWARDS[0](p, c[0]["content"], t) for p, c, t in zip(prompts, completions, target, strict=True)]


def thinking_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [REWARDS[1](p, c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]


class Clock(TrainerCallback):
    """Reports every step, and keeps its weights off the clock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: tuple[float, float] | None = None
        self._excluded_s, self._excluded_cpu_s = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._started is None:
            self._started = time.perf_counter(), time.process_time()
            print(json.dumps({"event": "first_step", "time": time.time(), "cpu_s": time.process_time()}), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        assert self._started is not None
        now, cpu = time.perf_counter(), time.process_time()
        line = {
            "step": state.global_step,
            "wall_s": now - self._started[0] - self._excluded_s,
            "cpu_s": cpu - self._started[1] - self._excluded_cpu_s,
        }
        weights = {name: weight.detach().clone().contiguous() for name, weight in model.named_parameters()}
        save_file(weights, self._folder / f"policy-{state.global_step:08d}.safetensors")
        print(json.dumps(line), flush=True)
        self._excluded_s += time.perf_counter() - now
        self._excluded_cpu_s += time.process_time() - cpu


def build_trainer(spec: dict[str, Any], folder: Path) -> GRPOTrainer:
    rows = [json.loads(line) for line in Path(spec["dataset"]).read_text().splitlines()]
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}], "target": row["target"]} for row in rows]
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=spec["seed"],
        max_steps=spec["num_steps"],
        per_device_train_batch_size=spec["groups_per_step"] * spec["group_size"],
        num_generations=spec["group_size"],
        max_completion_length=spec["max_res_tokens"],
        temperature=spec["temperature"],
        beta=spec["kl_beta"],
        epsilon=spec["clip_low"],
        epsilon_high=spec["clip_high"],
        loss_type="dapo",  # token mean over the whole step, as Sluice's token_mean
        scale_rewards="group",
        reward_weights=[0.5, 0.5],  # their sum is Sluice's mean
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=spec["warmup_steps"],
        adam_beta1=spec["betas"][0],
        adam_beta2=spec["betas"][1],
        weight_decay=spec["weight_decay"],
        max_grad_norm=spec["max_grad_norm"],
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        reward_funcs=[math_reward, thinking_reward],
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[Clock(folder)],
    )


def main() -> None:
    spec, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(spec, folder)
    torch.set_num_threads(spec["threads"])  # accelerate may have changed it
    trainer.train()


if __name__ == "__main__":
    main()
