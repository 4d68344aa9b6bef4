"""Reward functions by name, as callables: `math`, `thinking` and `code` are Sluice's own, all others paths (`common/loading.py`).

Two kinds of callables, told apart by the names of their parameters:

    per sample   fn(prompt, response, target) -> float | None
    TRL          fn(prompts, completions, completion_ids, <each column as a list>, trainer_state, log_metric, log_extra)
                   -> list[float | None]

Either may be `async def`. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.common.config import RewardFunction
from sluice.common.errors import ConfigError, did_you_mean
from sluice.common.loading import add_code_folder, find_function, is_function_path

SHIPPED = {
    "math": "sluice.workers.rewards.MathReward",
    "thinking": "sluice.workers.rewards.ThinkingReward",
    "code": "sluice.workers.rewards.CodeReward",
}
"""Short names."""
TRL_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
TRL_HOOKS = frozenset({"trainer_state", "log_metric", "log_extra"})
_SAMPLE_ARGUMENTS = frozenset({"prompt", "response", "target"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedReward:
    """A reward function, ready to be called."""

    name: str
    "in metrics; unique within a run"
    weight: float
    "in a `sum`"
    function: Callable[..., Any]
    per_sample: bool
    "per-sample kind; otherwise TRL's"
    is_async: bool
    accepts: frozenset[str] | None
    "names of the arguments it takes; none = any (**kwargs)"
    requires: frozenset[str]
    "names of those without a default"
    file: str | None
    "where it is defined"

    def missing(self, columns: Collection[str], *, has_target: bool) -> str | None:
        """Return what is wrong where a required argument is none of a dataset's columns; None where nothing is."""
        known = _SAMPLE_ARGUMENTS if self.per_sample else TRL_ARGUMENTS | TRL_HOOKS | set(columns)
        known |= {"target"} if has_target else set()
        if not (absent := sorted(self.requires - known)):
            return None
        if self.per_sample:
            return f"takes {', '.join(absent)}, but is called for each sample with prompt, response and target: give it a default"
        near = difflib.get_close_matches(absent[0], columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "rename one of them, set kwargs, or give it a default"
        return f"takes {', '.join(absent)}, but the columns are {', '.join(columns)}: {hint}"


def load_reward_functions(functions: Sequence[RewardFunction], *, code_folder: str | None = None) -> list[LoadedReward]:
    """Import and, for classes, instantiate the configured functions, in order.

    code_folder: where dotted paths are found; none = the working directory.
    Raises ConfigError: not importable, not callable, wrong kwargs, unknown signature, equal names.
    """
    add_code_folder(code_folder)
    rewards = [_load(function) for function in functions]
    refuse_equal_names(rewards)
    return rewards


def refuse_equal_names(rewards: Sequence[LoadedReward]) -> None:
    """Raise ConfigError where two functions have the same name."""
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ConfigError(f"reward.functions: names must differ, got {', '.join(names)}: set `name` on the equal ones")


def _load(entry: RewardFunction) -> LoadedReward:
    where = f"reward.functions: {entry.function!r}"
    path = SHIPPED.get(entry.function, entry.function)
    if not is_function_path(path):
        hint = did_you_mean(path.lower().removesuffix("reward"), SHIPPED) or f"those are {', '.join(SHIPPED)}"
        raise ConfigError(f"{where} is none of Sluice's rewards; {hint} One of your own is rewards.py:{path}")
    found = find_function(path, where="reward.functions")
    short = entry.function if entry.function in SHIPPED else ""
    name = entry.name or short or str(getattr(found, "__name__", type(found).__name__))
    try:
        function = found(**entry.kwargs) if isinstance(found, type) else functools.partial(found, **entry.kwargs)
        if not callable(function):
            raise TypeError("its instances cannot be called: define __call__(self, completions, **kwargs)")
        parameters = inspect.signature(function).parameters
    except Exception as error:  # a class' __init__ may raise anything
        raise ConfigError(
            f"{where} cannot be set up with kwargs {entry.kwargs}: {type(error).__name__}: {error}"
        ) from error
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters.values()):
        raise ConfigError(f"{where} takes parameters by position only: arguments are given by name, so remove the `/`")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    per_sample = "response" in parameters and not TRL_ARGUMENTS & parameters.keys()
    if not per_sample and not takes_any and not TRL_ARGUMENTS & parameters.keys():
        raise ConfigError(
            f"{where} takes ({', '.join(parameters)}): name its parameters (prompt, response, target) to be called for "
            "each sample, or (prompts, completions, **kwargs) to be called for all of a group"
        )
    return LoadedReward(
        name=name,
        weight=entry.weight,
        function=function,
        per_sample=per_sample,
        is_async=_is_async(found),
        accepts=None if takes_any else frozenset(parameters),
        requires=frozenset(
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ),
        file=getattr(sys.modules.get(getattr(found, "__module__", "")), "__file__", None),
    )


def _is_async(found: Any) -> bool:
    caller = found if isinstance(found, type) else type(found)  # an instance is called through its class
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(caller.__call__)
