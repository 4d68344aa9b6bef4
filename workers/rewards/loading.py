"""Reward functions by name: from a dotted path or a file to something that can be called.

Two kinds of callables, told apart by the names of their parameters:

    per sample   fn(prompt, response, target) -> float | None
    TRL          fn(prompts, completions, completion_ids, <each column as a list>, trainer_state) -> list[float | None]

Either may be `async def`. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sluice.common.config import RewardFunction
from sluice.common.errors import ConfigError

TRL_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})


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


def load_reward_functions(functions: Sequence[RewardFunction]) -> list[LoadedReward]:
    """Import and, for classes, instantiate the configured functions, in order.

    `pkg.module.attr`, `pkg.module:attr` or `path/to/file.py:attr`; the working directory is importable, and relative
    paths start there. Raises ConfigError: not importable, not callable, wrong kwargs, unknown signature, equal names.
    """
    rewards = [_load(function) for function in functions]
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ConfigError(f"reward.functions: names must differ, got {', '.join(names)}: set `name` on the equal ones")
    return rewards


def _load(entry: RewardFunction) -> LoadedReward:
    where = f"reward.functions: {entry.function!r}"
    found = _find(entry.function, where)
    if not callable(found):
        raise ConfigError(f"{where} is of type {type(found).__name__}, not callable: name a function or a class")
    name = entry.name or str(getattr(found, "__name__", type(found).__name__))
    try:
        function = found(**entry.kwargs) if isinstance(found, type) else functools.partial(found, **entry.kwargs)
        parameters = inspect.signature(function).parameters
    except Exception as error:  # a class' __init__ may raise anything
        raise ConfigError(
            f"{where} cannot be set up with kwargs {entry.kwargs}: {type(error).__name__}: {error}"
        ) from error
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
    )


def _is_async(found: Any) -> bool:
    caller = found if isinstance(found, type) else type(found)  # an instance is called through its class
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(caller.__call__)


def _find(path: str, where: str) -> Any:
    """What a dotted path or file names. Raises ConfigError."""
    source, colon, attribute = path.rpartition(":" if ":" in path else ".")
    if not source or not attribute:
        raise ConfigError(
            f"{where} names no function: write pkg.module.function, pkg.module:function or file.py:function"
        )
    try:
        module = _import_file(source, where) if source.endswith(".py") and colon == ":" else _import(source)
    except ConfigError:
        raise
    except Exception as error:  # user code runs on import
        raise ConfigError(
            f"{where}: importing {source} failed with {type(error).__name__}: {error}; it must be importable from "
            f"{Path.cwd()}, where this process runs"
        ) from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"define it in {module.__file__}"
        raise ConfigError(f"{where}: {source} has no {attribute!r}; {hint}") from None


def _import(name: str) -> ModuleType:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # console scripts do not add it; last, so that it shadows nothing
    return importlib.import_module(name)


def _import_file(source: str, where: str) -> ModuleType:
    """The module of a file, loaded once per process."""
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(
            f"{where}: there is no file {file}: relative paths start where the process runs, {Path.cwd()}"
        )
    name = f"sluice_rewards_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, file
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
