"""The job of a config in one process, one step after the other: no Celery, no Redis, nothing asynchronous.

The like-for-like baseline of `benchmarks/`: same model, prompts, rewards, advantages, loss and optimizer as the system,
and the place where the values of config/quickstart.yaml were found. It asks two things of the data that the system does
not: all prompts have one length, and a batch fits one forward pass; and it draws from the whole vocabulary (no top_p).
`--policy-age N` samples every batch with the weights of N steps before: an asynchronous run at its worst.

    python -m sluice.scripts.prepare_tiny runs/tiny
    python -m benchmarks.sync_baseline config/quickstart.yaml [key=value ...] [--policy-age 1] [--json out.json]

JSON: the settings, the mean reward of each step, and per evaluation the step, greedy and sampled accuracy, and CPU
seconds, wall seconds and generated tokens of training so far (evaluations are timed apart, in eval_cpu_s).

Legend: N prompts, B = N * group_size sequences, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained
from sluice.trainer.advantage import compute_advantages
from sluice.trainer.loss import policy_loss
from sluice.trainer.trained_policy import schedule_factor
from sluice.workers.engine.torch.kv_cache import cache_argument
from sluice.workers.rewards import MathReward, ThinkingReward

REWARDS = (MathReward(), ThinkingReward())  # the quickstart's; their unweighted mean is the reward


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Completions of N prompts, right-padded."""

    token_ids: Tensor
    "[B, P + T], prompts included"
    logprobs: Tensor
    "[B, T], of the policy that sampled"
    mask: Tensor
    "[B, T], 1 on the completion's tokens, its end token included"


@dataclass(kw_only=True, slots=True)
class Clock:
    """What training has cost so far."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    generate_cpu_s: float = 0.0
    generated_tokens: int = 0
    eval_cpu_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Report:
    """What is written as JSON."""

    settings: dict[str, Any]
    rewards: list[float] = field(default_factory=list)
    "mean reward of each step's batch"
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: Tensor, *, n: int, max_tokens: int, temperature: float, eos: int
) -> Rollouts:
    """n completions of each prompt [N, P]: one prefill per prompt, finished rows dropped. Temperature 0 is greedy."""
    cache = DynamicCache(config=model.config)
    logits = model(prompts, logits_to_keep=1, **{cache_argument(model): cache}).logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    rows = torch.arange(len(logits))  # [B], those still running
    tokens = torch.full((len(rows), max_tokens), eos)
    logprobs = torch.zeros(tokens.shape)
    mask = torch.zeros(tokens.shape)
    for position in range(max_tokens):
        chosen, logprob = draw(logits, temperature=temperature)
        tokens[rows, position], logprobs[rows, position], mask[rows, position] = chosen, logprob, 1.0
        running = (chosen != eos).nonzero().squeeze(1)
        if len(running) == 0 or position == max_tokens - 1:
            break
        if len(running) < len(rows):
            rows, chosen = rows[running], chosen[running]
            cache.batch_select_indices(running)
        logits = model(chosen[:, None], **{cache_argument(model): cache}).logits[:, -1]
    longest = int(mask.sum(1).max())
    token_ids = torch.cat([prompts.repeat_interleave(n, 0), tokens[:, :longest]], dim=1)
    return Rollouts(token_ids=token_ids, logprobs=logprobs[:, :longest], mask=mask[:, :longest])


def draw(logits: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """(token [B], its logprob [B]); one uniform number per row against the cumulative distribution."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # [B, V]
    if temperature == 0:
        chosen = logprobs.argmax(-1, keepdim=True)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        point = torch.rand(len(logits), 1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[-1] - 1)
    return chosen.squeeze(1), logprobs.gather(-1, chosen).squeeze(1)


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts, *, temperature: float) -> Tensor:
    """[B, T] logprobs of the completions; padding is on the right, so causality hides it."""
    num_tokens = rollouts.mask.shape[1]
    logits = model(rollouts.token_ids, logits_to_keep=num_tokens + 1, use_cache=False).logits[:, :-1] / temperature
    targets = rollouts.token_ids[:, -num_tokens:, None]
    return torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1)


class SyncRun:
    """One run of one config."""

    def __init__(self, config: Config, *, policy_age: int, corrected: bool = True) -> None:
        """corrected: the loss sees the sampler's logprobs; otherwise the trainer's own, as if the batch were on-policy."""
        torch.manual_seed(config.seed)
        self.corrected = corrected
        self.config = config
        self.model = load_pretrained(config.model.path, revision=config.model.revision)
        self.sampler = copy.deepcopy(self.model).eval()
        self.reference = copy.deepcopy(self.model).eval() if config.trainer.loss.kl_beta > 0 else None
        self.history: deque[dict[str, Tensor]] = deque(maxlen=policy_age + 1)
        self.tokenizer: PreTrainedTokenizerBase = read_assets(config.model.path).tokenizer()
        self.eos = int(self.tokenizer.eos_token_id)
        recipe = config.trainer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: schedule_factor(config.trainer, done + 1)
        )
        self.clock = Clock()

    def step(self, rows: list[dict[str, str]]) -> float:
        """Sample, score, and take one optimizer step; the mean reward."""
        cpu, wall = time.process_time(), time.perf_counter()
        rollouts, scores = self._rollouts(rows)  # scores: [B, functions]
        self.clock.generate_cpu_s += time.process_time() - cpu
        temperature = self.config.sampling.temperature
        groups = scores.mean(1).view(len(rows), -1)
        advantages = torch.cat([compute_advantages(g, method=self.config.trainer.advantage) for g in groups])
        ref_logprobs = None
        if self.reference is not None:
            with torch.no_grad():
                ref_logprobs = completion_logprobs(self.reference, rollouts, temperature=temperature)
        logprobs = completion_logprobs(self.model, rollouts, temperature=temperature)
        loss, _ = policy_loss(
            self.config.trainer.loss,
            policy_logprobs=logprobs,
            rollout_logprobs=rollouts.logprobs if self.corrected else logprobs.detach(),
            advantages=advantages,
            loss_mask=rollouts.mask,
            ref_logprobs=ref_logprobs,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.clock.cpu_s += time.process_time() - cpu
        self.clock.wall_s += time.perf_counter() - wall
        self.clock.generated_tokens += int(rollouts.mask.sum())
        return scores.mean().item()

    def _rollouts(self, rows: list[dict[str, str]]) -> tuple[Rollouts, Tensor]:
        """Completions by the policy of `policy_age` steps ago, and their scores."""
        self.history.append({name: weight.detach().clone() for name, weight in self.model.state_dict().items()})
        self.sampler.load_state_dict(self.history[0])
        sampling = self.config.sampling
        rollouts = self._generate(rows, n=sampling.group_size, temperature=sampling.temperature, model=self.sampler)
        return rollouts, self._score(rows, rollouts)

    def _generate(self, rows: list[dict[str, str]], *, n: int, temperature: float, model: PreTrainedModel) -> Rollouts:
        prompts = torch.tensor(
            [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
                )
                for row in rows
            ]
        )
        limit = self.config.sampling.max_res_tokens
        return generate(model, prompts, n=n, max_tokens=limit, temperature=temperature, eos=self.eos)

    def _score(self, rows: list[dict[str, str]], rollouts: Rollouts) -> Tensor:
        """[B, functions]"""
        lengths = rollouts.mask.sum(1).long().tolist()
        completions = rollouts.token_ids[:, -rollouts.mask.shape[1] :].tolist()
        texts = self.tokenizer.batch_decode(
            [tokens[:length] for tokens, length in zip(completions, lengths, strict=True)], skip_special_tokens=True
        )
        group_size = len(texts) // len(rows)
        asked = [row for row in rows for _ in range(group_size)]
        return torch.tensor(
            [
                [reward(row["prompt"], text, row["target"]) for reward in REWARDS]
                for row, text in zip(asked, texts, strict=True)
            ]
        )

    def evaluate(self, rows: list[dict[str, str]], *, num_samples: int) -> dict[str, float]:
        """Share of correct completions on held-out rows, greedy and sampled."""
        cpu = time.process_time()
        self.model.eval()
        accuracy = {}
        for name, n, temperature in (("greedy", 1, 0.0), ("sampled", num_samples, self.config.sampling.temperature)):
            if n > 0:
                rollouts = self._generate(rows, n=n, temperature=temperature, model=self.model)
                accuracy[name] = (self._score(rows, rollouts)[:, 0] == 1).float().mean().item()
        self.clock.eval_cpu_s += time.process_time() - cpu
        return accuracy


def batches(rows: list[dict[str, str]], *, size: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Endless batches of a seeded permutation per epoch; an epoch's ragged end is left out."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def run(config: Config, *, policy_age: int = 0, corrected: bool = True) -> Report:
    """Train as the config says, evaluating on its first evaluation set."""
    job = SyncRun(config, policy_age=policy_age, corrected=corrected)
    held_out = config.evaluation.datasets[0]
    eval_rows = _read(held_out.dataset.path)[: held_out.num_prompts]
    train = batches(_read(config.dataset.path), size=config.groups_per_step, seed=config.seed)
    num_steps, every = config.trainer.num_steps, config.evaluation.every_steps or config.trainer.num_steps
    report = Report(settings={"policy_age": policy_age, "config": config.model_dump(mode="json")})
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            accuracy = job.evaluate(eval_rows, num_samples=held_out.num_samples)
            report.evaluations.append({"step": step, **accuracy, **asdict(job.clock)})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"step {step}  {shown}  {job.clock.cpu_s:.1f} CPU s", flush=True)
        if step < num_steps:
            report.rewards.append(job.step(next(train)))
    return report


def _read(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A config's job in one process, synchronously.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--policy-age", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = run(load_config(args.config, args.overrides), policy_age=args.policy_age)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
