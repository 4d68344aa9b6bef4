"""Held-out evaluations: asked for by writing a line into Redis, answered by the same queues that serve training.

`request` pins the policy version (the store keeps it) and names the set; the dataset role admits its groups, pinned to
that version and filed under kind `eval`, so that they never enter the buffer; the scores collect in `eval:<id>`.
Reading a result is a pure function of that hash:

    pass@1 = share of greedy completions that are correct
    pass@k = mean over prompts of 1 - C(n-c, k) / C(n, k), n samples of which c are correct   (arXiv 2107.03374)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import redis

from common.config import EvalDataset
from common.keys import Keys
from common.scripts import Scripts
from common.serialization import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One finished evaluation."""

    dataset: str
    version: int
    num_prompts: int
    num_dead: int
    "prompts without an answer, for infrastructure reasons; left out of the means"
    pass_at_1: float
    pass_at_k: float | None
    k: int


def evaluation_id(version: int, dataset: str) -> str:
    return f"{version}.{dataset}"


def request(client: redis.Redis, keys: Keys, dataset: EvalDataset, *, version: int) -> None:
    """Ask for an evaluation of a published version; asking twice asks once."""
    evaluation = evaluation_id(version, dataset.name)
    if not client.hexists(keys("eval", evaluation), "total"):
        Scripts(client, keys)("small", "HSET", "evaluations", evaluation, version)


def pending(client: redis.Redis, keys: Keys) -> list[str]:
    """Evaluations that are not finished."""
    return [name.decode() for name in client.hkeys(keys("evaluations"))]


def result(client: redis.Redis, keys: Keys, dataset: EvalDataset, *, version: int) -> EvalResult | None:
    """The result, or None while it is not finished."""
    evaluation = keys("eval", evaluation_id(version, dataset.name))
    total, done = client.hmget(
        evaluation, ["total", "done"]
    )  # the trainer asks at every step; most answers are "not yet"
    if total is None or int(done or 0) < int(total):
        return None
    fields = {name.decode(): value for name, value in client.hgetall(evaluation).items()}
    greedy: dict[str, list[bool]] = {}
    sampled: dict[str, list[bool]] = {}
    dead = 0
    for name, value in fields.items():
        kind, _, group = name.partition(":")
        dead += kind == "dead"
        if kind == "result":
            rewards = decode(value)["by_function"]
            scores = rewards[dataset.function or next(iter(rewards))]
            correct = [score is not None and score >= dataset.correct_if for score in scores]
            (greedy if group.endswith("g") else sampled)[group[:-1]] = correct
    return EvalResult(
        dataset=dataset.name,
        version=version,
        num_prompts=len(greedy),
        num_dead=dead,
        pass_at_1=_mean([float(c[0]) for c in greedy.values()]),
        pass_at_k=_mean([pass_at_k(c, k=dataset.num_samples) for c in sampled.values()])
        if dataset.num_samples
        else None,
        k=dataset.num_samples,
    )


def pass_at_k(correct: list[bool], *, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct, from n >= k samples of one prompt."""
    n, c = len(correct), sum(correct)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
