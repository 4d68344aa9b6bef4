"""Held-out evaluations: asked for by writing a line into Redis, answered by the same queues that serve training.

`request` pins the policy version (the store keeps it) and names the set; the dataset role admits its groups, pinned to
that version and filed under kind `eval`, so that they never enter the buffer; the scores collect in `eval:<id>`.
Reading a result is a pure function of that hash. Over the prompts of a set, from n samples of which c are correct:

    pass@1          share whose greedy completion is correct
    sampled_pass@1  mean of c / n
    pass@k          mean of 1 - C(n-c, k) / C(n, k)                                           (arXiv 2107.03374)
    maj@n           share whose most frequent answer is correct                               (arXiv 2203.11171)
    <score>_stderr  standard error of that mean: s / sqrt(prompts), s the deviation between prompts (arXiv 2411.00640)

A prompt whose group is dead-lettered is in none of them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import redis

from common.config import EvalDataset
from common.keys import Keys
from common.run import Run
from common.scripts import Scripts
from common.serialization import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One finished evaluation."""

    dataset: str
    version: int
    num_prompts: int
    "whose greedy completion was scored"
    num_dead: int
    "prompts with a group that was dead-lettered, for infrastructure reasons; that group is left out of the means"
    scores: dict[str, float]
    "shares of correct answers, by the names in EvalDataset.scores; nan where no prompt was scored"
    stderr: dict[str, float]
    "their standard errors; nan with fewer than two prompts"
    mean_length: float
    "of the greedy completions, in tokens"
    clipped_ratio: float
    "share of the greedy completions that max_res_tokens cut off"

    def metrics(self) -> dict[str, float]:
        """Everything but the names and counts, as it is called in metrics behind eval/<dataset>/."""
        found: dict[str, float] = {}
        for name, value in self.scores.items():
            found |= {name: value, f"{name}_stderr": self.stderr[name]}
        return {**found, "mean_length": self.mean_length, "clipped_ratio": self.clipped_ratio}


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best checkpoint of a run, as the file `best` in its checkpoints folder names it (written by trainer/best.py)."""

    step: int
    version: int
    "policy version that the checkpoint holds"
    evaluated_version: int
    "the version that was evaluated: the same, or published bit for bit the same"
    metric: str
    "<set>/<score>, as in checkpoint.keep_best"
    value: float


def read_best(checkpoints: Path) -> Best | None:
    """The best checkpoint; None where none is known."""
    with suppress(FileNotFoundError):
        return Best(**json.loads((checkpoints / "best").read_text()))
    return None


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


def named(evaluation: str) -> tuple[str, int]:
    """Set and version of an evaluation id."""
    version, _, name = evaluation.partition(".")
    return name, int(version)


def unreported(client: redis.Redis, run: Run) -> set[tuple[str, int]]:
    """(set, version) of every evaluation whose result no trainer has reported, finished or not."""
    sets = {dataset.name for dataset in run.config.evaluation.datasets}
    known = {named(name) for name in (*pending(client, run.keys), *_admitted(client, run.keys))}
    return {
        (name, version)
        for name, version in known
        if name in sets and not client.hexists(run.keys("eval", evaluation_id(version, name)), "reported")
    }


def mark_reported(client: redis.Redis, keys: Keys, *, dataset: str, version: int) -> None:
    Scripts(client, keys)("small", "HSET", f"eval:{evaluation_id(version, dataset)}", "reported", 1)


def _admitted(client: redis.Redis, keys: Keys) -> list[str]:
    """Ids of the evaluations that have groups."""
    pattern = keys("eval", "*").replace("{", "[{]").replace("}", "[}]")
    return [key.decode().rpartition(":eval:")[2] for key in client.scan_iter(match=pattern, count=1000)]


def result(client: redis.Redis, keys: Keys, dataset: EvalDataset, *, version: int) -> EvalResult | None:
    """The result, or None while it is not finished."""
    evaluation = keys("eval", evaluation_id(version, dataset.name))
    total, done = client.hmget(evaluation, ["total", "done"])  # the trainer asks at every step, mostly in vain
    if total is None or int(done or 0) < int(total):
        return None
    greedy: list[dict[str, Any]] = []
    sampled: list[dict[str, Any]] = []
    dead = set()
    for name, value in client.hgetall(evaluation).items():
        kind, _, group = name.decode().partition(":")
        if kind == "dead":
            dead.add(group[:-1])
        elif kind == "result":
            (greedy if group.endswith("g") else sampled).append(decode(value))
    scored = _scores_by_prompt(dataset, greedy, sampled)
    return EvalResult(
        dataset=dataset.name,
        version=version,
        num_prompts=len(greedy),
        num_dead=len(dead),
        scores={name: _mean(values) for name, values in scored.items()},
        stderr={name: _standard_error(values) for name, values in scored.items()},
        mean_length=_mean([length for group in greedy for length in group.get("lengths", ())]),
        clipped_ratio=_mean([clipped for group in greedy for clipped in group.get("clipped", ())]),
    )


def _scores_by_prompt(
    dataset: EvalDataset, greedy: list[dict[str, Any]], sampled: list[dict[str, Any]]
) -> dict[str, list[float]]:
    """Score name -> one value per prompt, from what the reward role stored of each group."""

    def correct(group: dict[str, Any]) -> list[bool]:
        rewards = group["by_function"]
        values = rewards[dataset.function or next(iter(rewards))]
        return [value is not None and value >= dataset.correct_if for value in values]

    found = {"pass@1": [float(correct(group)[0]) for group in greedy]}
    for name, k in dataset.estimated.items():
        found[name] = [pass_at_k(correct(group), k=k) for group in sampled]
    if dataset.vote:  # groups scored before answers were kept do not vote
        found[dataset.vote] = [majority_vote(g["answers"], correct(g)) for g in sampled if "answers" in g]
    return found


def pass_at_k(correct: list[bool], *, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct, from n >= k samples of one prompt."""
    n, c = len(correct), sum(correct)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Probability in [0, 1] that the most frequent answer of one prompt's samples is correct; None does not vote.

    Among equally frequent answers one is drawn, and of samples with that answer one is judged (a reward may look at more
    than the answer): the value is the expectation over both draws, so it needs no luck. It is the share of correct ones
    among the samples that gave a winning answer; 0 where no sample gave any.
    """
    votes: Counter[str | None] = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = [right for answer, right in zip(answers, correct, strict=True) if votes[answer] == most > 0]
    return fmean(winners) if winners else 0.0


def read_all(client: redis.Redis, run: Run) -> list[dict[str, Any]]:
    """All finished evaluations of a run's sets, by set and version: dataset, version, step, metrics (None for nan), counts."""
    found = []
    for name, version in map(named, _admitted(client, run.keys)):
        dataset = next((d for d in run.config.evaluation.datasets if d.name == name), None)
        finished = dataset and result(client, run.keys, dataset, version=version)
        if not finished:
            continue
        line = client.hget(run.keys("lineage"), str(version))
        entry = {"dataset": name, "version": version, "step": int(line.split(b":")[1]) if line else None}
        metrics = {name: value if math.isfinite(value) else None for name, value in finished.metrics().items()}
        found.append({**entry, **metrics, "num_prompts": finished.num_prompts, "num_dead": finished.num_dead})
    return sorted(found, key=lambda entry: (entry["dataset"], entry["version"]))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
