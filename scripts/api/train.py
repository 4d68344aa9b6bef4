"""`sluice.train` and `sluice.start`: a run from Python, the same as `sluice run` makes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from sluice.common.errors import ConfigError
from sluice.scripts.api.call import Call, Reward
from sluice.scripts.api.process import RunProcess
from sluice.scripts.api.run import Run, load


def train(
    *,
    model: str | PathLike[str] | None = None,
    dataset: object = None,
    rewards: Reward | Sequence[Reward] | None = None,
    steps: int | None = None,
    group_size: int | None = None,
    config: str | PathLike[str] | None = None,
    name: str | None = None,
    resume: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Train to the end, with progress in the terminal or notebook; return the run.

    The same as `sluice run`: processes of their own, a real Redis, a run folder under `runs/`.

    model: hub id or folder. dataset: rows as dicts, a datasets.Dataset, a pandas DataFrame, or a path or hub id.
    rewards: functions or classes, `math`, `thinking`, `code`, paths such as `rewards.py:f`, or entries of `reward.functions`.
    config: a file, or the name of a shipped config, whose keys the other arguments replace. resume: a run folder to continue.
    settings: any key of the config: `trainer__learning_rate=1e-5`, `trainer={"learning_rate": 1e-5}`, or with dots in
    `settings={"trainer.learning_rate": 1e-5}`.

    Ctrl-C ends the run in order, a second one at once (`Run.wait`). Raises ConfigError for what cannot be run, RunFailed.
    """
    given = {"model": model, "dataset": dataset, "rewards": rewards, "steps": steps, "group_size": group_size}
    return _launched({**given, "config": config}, settings, name=name, resume=resume).wait()


def start(
    *,
    model: str | PathLike[str] | None = None,
    dataset: object = None,
    rewards: Reward | Sequence[Reward] | None = None,
    steps: int | None = None,
    group_size: int | None = None,
    config: str | PathLike[str] | None = None,
    name: str | None = None,
    resume: str | PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Start a run in the background and return it as soon as it is checked: model, dataset and rewards are then in order.

    It ends with the program that started it, whatever ends that; `wait` shows its progress. Arguments and errors: `train`.
    """
    given = {"model": model, "dataset": dataset, "rewards": rewards, "steps": steps, "group_size": group_size}
    run = _launched({**given, "config": config}, settings, name=name, resume=resume)
    run._wait_for_start()
    return run


def _launched(
    given: dict[str, Any], settings: dict[str, Any], *, name: str | None, resume: str | PathLike[str] | None
) -> Run:
    """Start `sluice run`. given: the arguments of `Call` but settings. Raises ConfigError."""
    if resume is not None:
        if settings or name is not None or any(each is not None for each in given.values()):
            raise ConfigError("resume continues a run with the config that it has: give nothing else with it")
        folder = load(resume).folder
        arguments = [str(folder / "config.yaml"), "--resume", folder.name]
    else:
        folder = Call(**given, settings=settings).make_folder(name)
        arguments = [str(folder / "run.yaml"), "--name", folder.name]
    return Run(folder, process=RunProcess(arguments, folder=folder))
