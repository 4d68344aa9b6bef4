"""Scoring one group with the configured reward functions.

A TRL function (`workers/rewards/loading.py` distinguishes the two kinds) gets the arguments that it names, or all of them where
it takes **kwargs; lists have one entry per completion. A conversational prompt (a list of messages) makes each
completion `[{"role": "assistant", "content": text}]`, as in TRL. Async functions of a group are awaited together, all groups of
a process in one event loop: a client or a semaphore may live as long as the process.

`None` = this function does not apply to this sample. Any other value that is not a finite float32, and any exception, is a
RewardError: an infrastructure failure, never a score of 0. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import math
import resource
import traceback
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from sluice.common.errors import RewardError
from sluice.common.types import Scores
from sluice.workers.rewards.loading import TRL_ARGUMENTS, TRL_HOOKS, LoadedReward, load_reward_functions

__all__ = ["LoadedReward", "load_reward_functions", "score_group"]

_NOT_COLUMNS = TRL_ARGUMENTS | TRL_HOOKS | {"prompt", "completion"}
_OTHER_LINES = ("eval/", "stall/")
"""Metrics by which a run continues, or which are no step's."""
_MAX_NAME = 200
_MAX = float(np.finfo(np.float32).max)


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
    logs = _Logs()
    hooks = {"trainer_state": SimpleNamespace(**trainer_state), **logs.hooks()}
    group = _trl_arguments(prompt, completions, completion_ids, target, columns) | hooks
    results = {reward.name: _call(reward, samples, group) for reward in rewards if not reward.is_async}
    # those that are not async may run an event loop of their own: ours does not run around them
    results |= _call_async([reward for reward in rewards if reward.is_async], samples, group)
    by_function = {reward.name: _validated(reward, results[reward.name], len(completions)) for reward in rewards}
    weights = [reward.weight for reward in rewards]
    totals = [_total(scores, weights, aggregation) for scores in zip(*by_function.values(), strict=True)]
    return Scores(
        reward=[_number("the reward functions together", total) for total in totals],
        by_function=by_function,
        metrics=logs.metrics,
        extra=logs.checked_extra(len(completions)),
    )


def limit_memory(limit_mib: int | None) -> None:
    """Bound what this process may allocate (reward.memory_limit_mib)."""
    if limit_mib is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit_mib << 20
        if hard == resource.RLIM_INFINITY or limit < hard:  # else the machine's own limit is tighter
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Logs:
    """What the functions of one group log, as TRL's trainers take it."""

    def __init__(self) -> None:
        self.metrics: dict[str, tuple[float, int]] = {}
        self._extra: dict[str, list[Any]] = defaultdict(list)

    def hooks(self) -> dict[str, Callable[[str, Any], None]]:
        """Return log_metric(name, value) and log_extra(column, values), as functions: `_call` copies what is an object."""

        def log_metric(name: str, value: Any) -> None:
            name = _checked_name("log_metric", name)
            if name.startswith(_OTHER_LINES):
                raise ValueError(
                    f"log_metric({name!r}, ...): names that begin with {' or '.join(_OTHER_LINES)} are taken"
                )
            total, count = self.metrics.get(name, (0.0, 0))
            self.metrics[name] = (total + float(value), count + 1)

        def log_extra(column: str, values: Any) -> None:
            self._extra[_checked_name("log_extra", column)].extend(map(_loggable, values))

        return {"log_metric": log_metric, "log_extra": log_extra}

    def checked_extra(self, num_completions: int) -> dict[str, list[Any]]:
        """Return the values of each column, one per completion. Raises RewardError."""
        for column, values in self._extra.items():
            if len(values) != num_completions:
                raise RewardError(
                    f"log_extra({column!r}, ...) was given {len(values)} values for {num_completions} completions: give one "
                    "for each, and use another name in another function"
                )
        return dict(self._extra)


def _checked_name(hook: str, name: object) -> str:
    """Return the name as trackers, Prometheus and a terminal can show it. Raises ValueError."""
    text = str(name)
    if not text.isprintable() or not 0 < len(text) <= _MAX_NAME:
        raise ValueError(f"{hook}({_text(name)}, ...): a name is 1 to {_MAX_NAME} printable characters in one line")
    return text


def _loggable(value: Any) -> Any:
    """Return a value that msgpack and JSON can express: a number, or text."""
    plain = value.item() if hasattr(value, "item") else value
    if plain is None or (isinstance(plain, (bool, int, float)) and -(2**63) <= plain < 2**63):
        return plain
    return str(plain).encode(errors="replace").decode()


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
    """Return the function's raw result for the group; a coroutine, or one per sample, where the function is async."""
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


def _call_async(rewards: list[LoadedReward], samples: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    """Return the raw results of async functions, which run together. What is left of them when one fails is cancelled."""
    if not rewards:
        return {}

    async def awaited(reward: LoadedReward, call: Coroutine[Any, Any, Any]) -> Any:
        with _errors_of(reward):
            return await call

    async def together() -> dict[str, Any]:
        tasks: dict[str, list[asyncio.Task[Any]]] = {}
        try:
            async with asyncio.TaskGroup() as running:
                for reward in rewards:
                    called = _call(reward, samples, group)
                    calls = called if reward.per_sample else [called]
                    tasks[reward.name] = [running.create_task(awaited(reward, call)) for call in calls]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__
        results = {name: [task.result() for task in of_function] for name, of_function in tasks.items()}
        return {
            reward.name: results[reward.name] if reward.per_sample else results[reward.name][0] for reward in rewards
        }

    loop = _event_loop()
    task = loop.create_task(together())
    with _errors_of(*rewards):
        try:
            return loop.run_until_complete(task)
        finally:
            if not task.done():  # the time limit came between two steps of the functions
                task.cancel()
                with suppress(asyncio.CancelledError, RewardError):
                    loop.run_until_complete(task)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process, made by its first group: what is bound to a loop may live as long as the process."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner.get_loop()


@contextmanager
def _errors_of(*rewards: LoadedReward) -> Iterator[None]:
    """Turn every error into a RewardError that names the function, and the line in its file."""
    try:
        yield
    except RewardError:
        raise
    except (Exception, asyncio.CancelledError, SystemExit) as error:  # also `exit()`, whatever the code
        names = ", ".join(reward.name for reward in rewards)
        files = {reward.file for reward in rewards}
        lines = [
            f" ({f.filename}:{f.lineno})" for f in traceback.extract_tb(error.__traceback__) if f.filename in files
        ]
        place = lines[-1] if lines else ""
        raise RewardError(f"reward function {names} raised {type(error).__name__}: {error}{place}") from error


def _validated(reward: LoadedReward, result: Any, num_completions: int) -> list[float | None]:
    """Return one float or None per completion, of whatever can be iterated over in order. Raises RewardError."""
    name = reward.name
    with _errors_of(reward):  # a generator is the function's own code
        values = result.tolist() if hasattr(result, "tolist") else result
        if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set)):
            values = [value.item() if hasattr(value, "item") else value for value in values]
    if not isinstance(values, list):
        raise RewardError(
            f"reward function {name} returned {_short(result)}, expected a list of {num_completions} numbers"
        )
    if len(values) != num_completions:
        raise RewardError(f"reward function {name} returned {len(values)} rewards for {num_completions} completions")
    return [_number(f"reward function {name}", value) for value in values]


def _number(who: str, value: Any) -> float | None:
    if value is None:
        return None
    if not hasattr(value, "__float__"):  # ints, fractions, decimals; not text
        raise RewardError(f"{who} returned {_short(value)}, which is neither a number nor None")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # of an int or a decimal; a signalling nan
        number = math.nan
    if not -_MAX <= number <= _MAX:  # nan is not either
        raise RewardError(
            f"{who} returned {_text(value)}: a reward is a float32, from -{_MAX:.4g} to {_MAX:.4g}; return "
            "None where it does not apply"
        )
    return number


def _short(value: Any) -> str:
    return f"{type(value).__name__} {_text(value)}"


def _text(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # of an int with more than 4300 digits, or a class of the user's
        text = f"({type(error).__name__} in its repr)"
    return text if len(text) <= 80 else text[:77] + "..."
