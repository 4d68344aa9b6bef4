"""Scoring one group with the configured reward functions.

A TRL function (`workers/rewards/loading.py` distinguishes the two kinds) gets the arguments that it names, or all of them where
it takes **kwargs; lists have one entry per completion. A conversational prompt (a list of messages) makes each
completion `[{"role": "assistant", "content": text}]`, as in TRL. Async functions of a group are awaited together.

`None` = this function does not apply to this sample. Any other value that is not a finite number, and any exception, is a
RewardError: an infrastructure failure, never a score of 0. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from types import SimpleNamespace
from typing import Any, Literal

from sluice.common.errors import RewardError
from sluice.common.types import Scores
from sluice.workers.rewards.loading import TRL_ARGUMENTS, LoadedReward, load_reward_functions

__all__ = ["LoadedReward", "load_reward_functions", "score_group"]

_NOT_COLUMNS = TRL_ARGUMENTS | {"prompt", "completion", "trainer_state"}


def score_group(
    rewards: Sequence[LoadedReward],
    *,
    aggregation: Literal["mean", "sum"],
    prompt: Any,
    completions: list[str],
    completion_ids: list[list[int]],
    target: str | None,
    columns: dict[str, Any],
    trainer_state: dict[str, Any],
) -> Scores:
    """Score the G completions of one prompt.

    `mean` is the unweighted mean of the functions that apply, `sum` their weighted sum; where none applies the total is
    None. `target` reaches TRL functions as the column `target`, `trainer_state` as an object with its keys as
    attributes. Raises RewardError.
    """
    samples = [{"prompt": prompt, "response": text, "target": target} for text in completions]
    group = _trl_arguments(prompt, completions, completion_ids, target, columns)
    group["trainer_state"] = SimpleNamespace(**trainer_state)
    results = {reward.name: _call(reward, samples, group) for reward in rewards if not reward.is_async}
    if pending := [reward for reward in rewards if reward.is_async]:
        # One event loop for all of them, and none around the synchronous ones, which may run their own.
        results |= asyncio.run(_call_together(pending, samples, group))
    by_function = {reward.name: _validated(reward.name, results[reward.name], len(completions)) for reward in rewards}
    weights = [reward.weight for reward in rewards]
    totals = [_total(scores, weights, aggregation) for scores in zip(*by_function.values(), strict=True)]
    return Scores(reward=totals, by_function=by_function)


def _total(scores: tuple[float | None, ...], weights: list[float], aggregation: str) -> float | None:
    applying = [(score, weight) for score, weight in zip(scores, weights, strict=True) if score is not None]
    if not applying:
        return None
    if aggregation == "sum":
        return sum(score * weight for score, weight in applying)
    return sum(score for score, _ in applying) / len(applying)


def _trl_arguments(
    prompt: Any, completions: list[str], completion_ids: list[list[int]], target: str | None, columns: dict[str, Any]
) -> dict[str, Any]:
    """Return keyword arguments of a TRL function, each a list of G; `target` overrides a column of that name."""
    conversational = isinstance(prompt, list)
    rows = {name: value for name, value in columns.items() if name not in _NOT_COLUMNS}
    if target is not None:
        rows["target"] = target
    return {
        "prompts": [prompt] * len(completions),
        "completions": [[{"role": "assistant", "content": c}] if conversational else c for c in completions],
        "completion_ids": completion_ids,
        **{name: [value] * len(completions) for name, value in rows.items()},
    }


def _call(reward: LoadedReward, samples: list[dict[str, Any]], group: dict[str, Any]) -> Any:
    """Return the function's raw result for the group; an awaitable, or one per sample, where the function is async."""
    fixed = getattr(reward.function, "keywords", {})  # configured kwargs override columns of the same name

    def accepted(arguments: dict[str, Any]) -> dict[str, Any]:
        # A function may change its arguments; the next sample and the next function must not see that.
        return {
            name: [copy.deepcopy(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)
            for name, value in arguments.items()
            if (reward.accepts is None or name in reward.accepts) and name not in fixed
        }

    with _errors_of(reward):
        if reward.per_sample:
            return [reward.function(**accepted(sample)) for sample in samples]
        return reward.function(**accepted(group))


async def _call_together(
    rewards: list[LoadedReward], samples: list[dict[str, Any]], group: dict[str, Any]
) -> dict[str, Any]:
    async def result_of(reward: LoadedReward) -> Any:
        awaitable = _call(reward, samples, group)
        with _errors_of(reward):
            return list(await asyncio.gather(*awaitable)) if reward.per_sample else await awaitable

    results = await asyncio.gather(*map(result_of, rewards))
    return {reward.name: result for reward, result in zip(rewards, results, strict=True)}


@contextmanager
def _errors_of(reward: LoadedReward) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RewardError(f"reward function {reward.name} raised {type(error).__name__}: {error}") from error


def _validated(name: str, result: Any, num_completions: int) -> list[float | None]:
    """Return one float or None per completion; arrays and tensors count as lists. Raises RewardError."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward function {name} returned {_short(result)}, expected a list of {num_completions} numbers"
        )
    if len(values) != num_completions:
        raise RewardError(f"reward function {name} returned {len(values)} rewards for {num_completions} completions")
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, Real):
        raise RewardError(f"reward function {name} returned {_short(value)}, which is neither a number nor None")
    if not math.isfinite(plain):
        raise RewardError(f"reward function {name} returned {plain}: return None where it does not apply")
    return float(plain)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
