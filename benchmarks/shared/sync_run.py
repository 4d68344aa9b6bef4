"""The job of a config in one process, one step after the other: no Celery, no Redis, nothing asynchronous.

Engine, prompts, rewards and training step are those of the system; the rewards are the quickstart's. Every batch may be sampled
with the weights of some steps before: an asynchronous run at its worst.

Legend: N prompts, n completions of each.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.common.config import Config
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.models.logprobs import score_sequences
from sluice.common.types import Completion, Episode, Group, SamplingParams
from sluice.trainer.distributed.parallel import ParallelPolicy
from sluice.trainer.step import train_on
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers.engine import GenerationRequest
from sluice.workers.rewards import MathReward, ThinkingReward
from sluice.workers.rollout import make_engine

REWARDS = (MathReward(), ThinkingReward())  # the quickstart's; their unweighted mean is the reward
Row = dict[str, str]
Weights = Mapping[str, Tensor]


@dataclass(kw_only=True, slots=True)
class Clock:
    """What training has cost so far."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    generate_cpu_s: float = 0.0
    generated_tokens: int = 0
    eval_cpu_s: float = 0.0


class SyncRun:
    """One run of one config; to be closed."""

    def __init__(self, config: Config, *, policy_age: int = 0, corrected: bool = True) -> None:
        """corrected: the loss sees the sampler's logprobs; otherwise the trainer's own, as if the batch were on-policy."""
        torch.manual_seed(config.seed)
        assets = read_assets(config.model.path)
        model = load_pretrained(config.model.path, revision=config.model.revision)
        self.clock = Clock()
        self._config, self._corrected = config, corrected
        self._tokenizer = assets.tokenizer()
        self._reference = copy.deepcopy(model).eval() if config.trainer.loss.kl_beta > 0 else None
        self._trained = TrainedPolicy.of_run(model, config, end_token_ids=assets.eos_token_ids)
        self._policy = ParallelPolicy(self._trained)
        self._engine = make_engine(config, assets)
        self._threads = ThreadPoolExecutor(config.rollout.max_sequences)  # each waits for one group
        self._history: deque[Weights] = deque(maxlen=policy_age + 1)
        self._noise = random.Random(config.seed)
        self._num_steps = self._version = 0

    def close(self) -> None:
        self._engine.close()
        self._threads.shutdown()

    def weights(self) -> Weights:
        """Return a copy of what is trained."""
        return self._trained.snapshot(torch.float32)

    def step(self, rows: list[Row]) -> float:
        """Sample, score, and take one optimizer step; the mean reward."""
        cpu, wall = time.process_time(), time.perf_counter()
        self._num_steps += 1
        self._history.append(self.weights())
        sampling = self._config.sampling
        made = self._generate(rows, self._history[0], n=sampling.group_size, temperature=sampling.temperature)
        self.clock.generate_cpu_s += time.process_time() - cpu
        groups = [self._group(row, *found) for row, found in zip(rows, made, strict=True)]
        train_on(self._policy, groups, self._config, step=self._num_steps)
        self.clock.cpu_s += time.process_time() - cpu
        self.clock.wall_s += time.perf_counter() - wall
        self.clock.generated_tokens += sum(len(made.token_ids) for _, group in made for made in group)
        return fmean(episode.reward for group in groups for episode in group.episodes if episode.reward is not None)

    def evaluate(self, rows: list[Row], weights: Weights, *, num_samples: int) -> dict[str, float]:
        """Return the share of right completions on held-out rows, greedy and (where samples are asked for) sampled."""
        cpu = time.process_time()
        accuracy = {}
        for name, n, temperature in (("greedy", 1, 0.0), ("sampled", num_samples, self._config.sampling.temperature)):
            if n > 0:
                made = self._generate(rows, weights, n=n, temperature=temperature)
                accuracy[name] = fmean(
                    scores[0] == 1
                    for row, (_, found) in zip(rows, made, strict=True)
                    for scores in self._score(row, found)
                )
        self.clock.eval_cpu_s += time.process_time() - cpu
        return accuracy

    def _generate(
        self, rows: list[Row], weights: Weights, *, n: int, temperature: float
    ) -> list[tuple[NDArray[np.int32], list[Completion]]]:
        """Prompt ids and completions of each row, by these weights."""
        self._version += 1
        self._engine.stage(self._version, str(self._version), weights)
        max_tokens = self._config.sampling.max_res_tokens
        requests = []
        for index, row in enumerate(rows):
            chat = [{"role": "user", "content": row["prompt"]}]
            ids = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            seed = self._noise.getrandbits(31)
            sampling = SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, seed=seed)
            requests.append(
                GenerationRequest(
                    group_id=f"{self._version}/{index}", prompt_ids=np.array(ids, np.int32), sampling=sampling,
                    min_version=self._version,
                )
            )  # fmt: skip
        made = self._threads.map(self._engine.generate, requests)
        return [(request.prompt_ids, found) for request, found in zip(requests, made, strict=True)]

    def _score(self, row: Row, completions: Sequence[Completion]) -> list[list[float]]:
        """[n, functions]"""
        texts = [self._tokenizer.decode(made.token_ids, skip_special_tokens=True) for made in completions]
        return [[reward(row["prompt"], text, row["target"]) for reward in REWARDS] for text in texts]

    def _group(self, row: Row, prompt_ids: NDArray[np.int32], completions: list[Completion]) -> Group:
        sequences = [(prompt_ids, made.token_ids) for made in completions]
        how = {"max_batch_tokens": 4096, "temperature": self._config.sampling.temperature}
        ref_logprobs: Sequence[Any] = [None] * len(completions)
        with torch.no_grad():
            if self._reference is not None:
                ref_logprobs = score_sequences(self._reference, sequences, **how)
            if not self._corrected:
                own = score_sequences(self._trained.model, sequences, **how)
                completions = [
                    replace(made, rollout_logprobs=found) for made, found in zip(completions, own, strict=True)
                ]
        scored = zip(completions, self._score(row, completions), ref_logprobs, strict=True)
        episodes = [
            Episode(completion=made, reward=fmean(scores), rewards={}, ref_logprobs=found)
            for made, scores, found in scored
        ]
        return Group(
            group_id=row["prompt"], policy_version=0, prompt_ids=prompt_ids, prompt=row["prompt"], target=row["target"],
            episodes=episodes, timestamps={},
        )  # fmt: skip


def batches(rows: list[Row], *, size: int, seed: int) -> Iterator[list[Row]]:
    """Endless batches of a seeded permutation per epoch; an epoch's ragged end is left out."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def read_rows(path: str) -> list[Row]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(config: Config, *, policy_age: int = 0, corrected: bool = True) -> dict[str, Any]:
    """Train as the config says, evaluating on its first evaluation set; mean rewards of the steps, and the evaluations."""
    held_out = config.evaluation.datasets[0]
    eval_rows = read_rows(held_out.dataset.path)[: held_out.num_prompts]
    train = batches(read_rows(config.dataset.path), size=config.groups_per_step, seed=config.seed)
    num_steps, every = config.trainer.num_steps, config.evaluation.every_steps or config.trainer.num_steps
    rewards, evaluations = [], []
    with closing(SyncRun(config, policy_age=policy_age, corrected=corrected)) as job:
        for step in range(num_steps + 1):
            if step % every == 0 or step == num_steps:
                accuracy = job.evaluate(eval_rows, job.weights(), num_samples=held_out.num_samples)
                evaluations.append({"step": step, **accuracy, **asdict(job.clock)})
            if step < num_steps:
                rewards.append(job.step(next(train)))
    return {"rewards": rewards, "evaluations": evaluations}
