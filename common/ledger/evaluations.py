"""Held-out evaluations: requested by a field in Redis, and run by the same queues that serve training.

`request` pins the policy version (the store keeps it) and names the set; the dataset role admits its groups, pinned to
that version and of kind `eval`, so that they never enter the buffer; the scores collect in `eval:<id>`. The first read of
a complete result folds what each group left into a summary of a few kB, from which it is read afterwards; a dead-lettered
group that is requeued after that is folded in when it is scored.

Over the prompts of a set, from n samples of which c are correct:

    pass@1          share whose greedy completion is correct
    sampled_pass@1  mean of c / n
    pass@k          mean of 1 - C(n-c, k) / C(n, k)                                           (arXiv 2107.03374)
    maj@n           share whose most frequent answer is correct                               (arXiv 2203.11171)
    <score>_stderr  standard error of that mean: s / sqrt(prompts), s the deviation between prompts (arXiv 2411.00640)

A dead-lettered group is in none of them; the other group of its prompt (greedy, samples) is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import redis

from sluice.common.config import EvalDataset
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.run import Run
from sluice.common.serialization import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One finished evaluation."""

    dataset: str
    version: int
    num_prompts: int
    "whose greedy completion was scored"
    num_dead: int
    "prompts with a group that was dead-lettered, for infrastructure reasons; that group is left out of the means"
    num_asked: int
    "prompts with a group, scored or dead"
    scores: dict[str, float]
    "shares of correct answers, by the names in EvalDataset.scores; nan where no prompt was scored"
    stderr: dict[str, float]
    "their standard errors; nan with fewer than two prompts"
    mean_length: float
    "of the greedy completions, in tokens"
    clipped_ratio: float
    "share of the greedy completions that max_res_tokens cut off"
    logged: dict[str, float]
    "means of what reward functions logged (`log_metric`) of the greedy completions"

    def metrics(self) -> dict[str, float]:
        """Return scores, errors and lengths under their metric names without eval/<dataset>/."""
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
    """Return the best checkpoint; None where none is known."""
    with suppress(FileNotFoundError):
        return Best(**json.loads((checkpoints / "best").read_text()))
    return None


def evaluation_id(version: int, dataset: str) -> str:
    return f"{version}.{dataset}"


def request(client: redis.Redis, keys: Keys, dataset: EvalDataset, *, version: int) -> None:
    """Request an evaluation of a published version; idempotent."""
    evaluation = evaluation_id(version, dataset.name)
    if not client.hexists(keys.evaluation(evaluation), "total"):
        Scripts(client, keys)("write_record", "HSET", keys.evaluations, evaluation, version)


def pending(client: redis.Redis, keys: Keys) -> list[str]:
    """Return the ids of unfinished evaluations."""
    return [name.decode() for name in client.hkeys(keys.evaluations)]


def waiting(client: redis.Redis, keys: Keys) -> dict[str, int]:
    """Return requested evaluations without groups -> version."""
    asked = {name.decode(): int(version) for name, version in client.hgetall(keys.evaluations).items()}
    return {name: version for name, version in asked.items() if not client.hexists(keys.evaluation(name), "total")}


def discard(client: redis.Redis, keys: Keys, evaluation: str) -> None:
    """Remove the request for an evaluation."""
    client.hdel(keys.evaluations, evaluation)


def named(evaluation: str) -> tuple[str, int]:
    """Return set and version of an evaluation id."""
    version, _, name = evaluation.partition(".")
    return name, int(version)


def unreported(client: redis.Redis, run: Run) -> set[tuple[str, int]]:
    """Return (set, version) of every evaluation whose result no trainer has reported, finished or not."""
    sets = {dataset.name for dataset in run.config.evaluation.datasets}
    return {
        (name, version)
        for name, version in begun(client, run.keys)
        if name in sets and not client.hexists(run.keys.evaluation(evaluation_id(version, name)), "reported")
    }


def begun(client: redis.Redis, keys: Keys) -> set[tuple[str, int]]:
    """Return (set, version) of every evaluation that was requested, finished or not."""
    return {named(name) for name in (*pending(client, keys), *_admitted(client, keys))}


def evaluated(client: redis.Redis, run: Run, versions: Collection[int]) -> set[int]:
    """Return those of the versions that have an evaluation, finished or not."""
    found = {version for _, version in map(named, pending(client, run.keys))}
    asked = [(version, dataset.name) for version in versions for dataset in run.config.evaluation.datasets]
    with client.pipeline(transaction=False) as pipe:
        for version, name in asked:
            pipe.exists(run.keys.evaluation(evaluation_id(version, name)))
        found |= {version for (version, _), exists in zip(asked, pipe.execute(), strict=True) if exists}
    return found.intersection(versions)


def mark_reported(client: redis.Redis, keys: Keys, *, dataset: str, version: int) -> None:
    Scripts(client, keys)("write_record", "HSET", keys.evaluation(evaluation_id(version, dataset)), "reported", 1)


def _admitted(client: redis.Redis, keys: Keys) -> list[str]:
    """Return the ids of the evaluations that have groups."""
    pattern = keys.evaluation("*").replace("{", "[{]").replace("}", "[}]")
    return [key.decode().rpartition(":eval:")[2] for key in client.scan_iter(match=pattern, count=1000)]


class _ScoreSums:
    """Sums over the scored groups: how often each value of a score occurred; of the greedy ones, lengths and logged metrics."""

    def __init__(self, summary: bytes | None) -> None:
        known: dict[str, Any] = {"scores": {}, "num_tokens": 0, "num_clipped": 0, "logged": {}}
        known |= decode(summary) if summary else {}
        self.scores: dict[str, Counter[float]] = defaultdict(Counter)
        "of one value per prompt"
        for name, values in known["scores"].items():
            self.scores[name].update(dict(values))
        self.num_tokens: int = known["num_tokens"]
        self.num_clipped: int = known["num_clipped"]
        self.logged: dict[str, tuple[float, int]] = {name: (total, n) for name, (total, n) in known["logged"].items()}
        "sum and count of each metric"

    def add(self, dataset: EvalDataset, group: dict[str, Any], *, is_greedy: bool) -> None:
        """Add what the reward role stored for one group."""
        rewards = group["by_function"]
        values = rewards[dataset.function or next(iter(rewards))]
        correct = [value is not None and value >= dataset.correct_if for value in values]
        if is_greedy:
            self.scores["pass@1"][float(correct[0])] += 1
            self.num_tokens += sum(group["lengths"])
            self.num_clipped += sum(group["clipped"])
            for name, (total, count) in group.get("metrics", {}).items():
                before = self.logged.get(name, (0.0, 0))
                self.logged[name] = before[0] + float(total), before[1] + int(count)
            return
        for name, k in dataset.estimated.items():
            self.scores[name][pass_at_k(correct, k=k)] += 1
        if dataset.vote:
            self.scores[dataset.vote][majority_vote(group["answers"], correct)] += 1

    def summary(self) -> bytes:
        """Serialize for the constructor; the size does not depend on the number of prompts."""
        scores = {name: [list(pair) for pair in counts.items()] for name, counts in self.scores.items()}
        lengths = {"num_tokens": self.num_tokens, "num_clipped": self.num_clipped}
        return encode({"scores": scores, **lengths, "logged": {name: list(sums) for name, sums in self.logged.items()}})


def result(client: redis.Redis, keys: Keys, dataset: EvalDataset, *, version: int) -> EvalResult | None:
    """Return the result, or None while it is not finished."""
    name = evaluation_id(version, dataset.name)
    # the trainer asks at every step, mostly in vain: two fields first
    total, done = client.hmget(keys.evaluation(name), ["total", "done"])
    if total is None or int(done or 0) < int(total):
        return None
    fields = {field.decode(): value for field, value in client.hgetall(keys.evaluation(name)).items()}
    sums = _ScoreSums(before := fields.get("summary"))
    dead, folded = set(), []
    for field, value in fields.items():
        kind, _, group = field.partition(":")
        if kind == "dead":
            dead.add(group[:-1])
        elif kind in ("result", "admitted"):
            folded.append(field)
        if kind == "result":
            sums.add(dataset, decode(value), is_greedy=group.endswith("g"))
    if folded:
        Scripts(client, keys)("fold_eval", name, before or b"", sums.summary(), *folded)
    scored = {score: sorted(sums.scores[score].elements()) for score in dataset.scores}
    num_greedy = len(scored["pass@1"])
    return EvalResult(
        dataset=dataset.name,
        version=version,
        num_prompts=num_greedy,
        num_dead=len(dead),
        num_asked=int(total) // (2 if dataset.num_samples else 1),
        scores={name: fmean(values) if values else math.nan for name, values in scored.items()},
        stderr={name: stdev(v) / math.sqrt(len(v)) if len(v) > 1 else math.nan for name, v in scored.items()},
        mean_length=sums.num_tokens / num_greedy if num_greedy else math.nan,
        clipped_ratio=sums.num_clipped / num_greedy if num_greedy else math.nan,
        logged={name: total / max(1, count) for name, (total, count) in sums.logged.items()},
    )


def pass_at_k(correct: list[bool], *, k: int) -> float:
    """Estimate without bias whether at least one of k samples is correct, from n >= k samples of one prompt."""
    n, c = len(correct), sum(correct)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Return the probability in [0, 1] that the most frequent answer of one prompt's samples is correct; None does not vote.

    Among equally frequent answers one is drawn, and of samples with that answer one is judged (a reward may look at more
    than the answer): the value is the expectation over both draws, which is the share of correct ones among the samples that
    gave a winning answer; 0 where no sample gave any.
    """
    votes: Counter[str | None] = Counter(answer for answer in answers if answer is not None)
    max_votes = max(votes.values(), default=0)
    winners = [right for answer, right in zip(answers, correct, strict=True) if votes[answer] == max_votes > 0]
    return fmean(winners) if winners else 0.0


def read_all(client: redis.Redis, run: Run) -> list[dict[str, Any]]:
    """Return finished evaluations of a run's sets, by set and version: dataset, version, step, metrics and `logged` (None for
    nan), counts, and whether the best checkpoint is the evaluated one."""
    best = read_best(Path(run.folder) / "checkpoints")
    marked = best and (best.metric.rpartition("/")[0], best.evaluated_version)
    found = []
    for name, version in map(named, _admitted(client, run.keys)):
        dataset = next((d for d in run.config.evaluation.datasets if d.name == name), None)
        finished = dataset and result(client, run.keys, dataset, version=version)
        if not finished:
            continue
        line = re.match(rb"-?[0-9]+:([0-9]{1,18})", client.hget(run.keys.lineage, str(version)) or b"")
        entry: dict[str, Any] = {"dataset": name, "version": version, "step": int(line[1]) if line else None}
        entry |= {**_finite(finished.metrics()), "logged": _finite(finished.logged)}
        counts = {name: getattr(finished, name) for name in ("num_prompts", "num_dead", "num_asked")}
        found.append({**entry, **counts, "best": (name, version) == marked})
    return sorted(found, key=lambda entry: (entry["dataset"], entry["version"]))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
