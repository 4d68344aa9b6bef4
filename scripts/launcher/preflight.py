"""What a run needs, checked before anything is started or stored: every bad input ends here, with exit code 2.

`preflight` stops at the first problem, `sluice doctor` lists them all: a check that does not need what failed before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

from sluice.common.config import Config, DatasetConfig, RewardFunction
from sluice.common.config.trainer import PEFT_MISSING
from sluice.common.errors import ConfigError, SluiceError
from sluice.scripts.launcher.roles import check_gpus
from sluice.trainer.trackers import check_trackers

if TYPE_CHECKING:  # imported where they are used: `sluice run` forks before their libraries are loaded
    from sluice.common.models.assets import ModelAssets
    from sluice.workers.rewards.loading import LoadedReward
    from sluice.workers.rewards.trial import Trial

Check = Callable[[], None]


def preflight(config: Config) -> dict[str, object]:
    """Check everything that a run will need; return the model's assets. Raises ConfigError."""
    found = Preflight(config)
    for check in found.checks():
        check()
    assert found.assets is not None
    return found.assets.to_wire()


def machine_checks(config: Config) -> Iterator[Check]:
    """Yield what is checked of the machine that the roles run on; each raises ConfigError."""
    from sluice.workers.engine import check_engine

    yield partial(check_engine, config.rollout.engine)
    yield partial(_check_adapters, config)
    yield partial(check_trackers, config.metrics)
    yield partial(check_gpus, config)


def problems(config: Config) -> list[str]:
    """Return all that is wrong with a config, and with this machine for it."""
    found: list[str] = []
    for check in chain(machine_checks(config), Preflight(config).checks()):  # the last follow from those before
        try:
            check()
        except SluiceError as error:
            found.append(str(error))
    return found


def _check_adapters(config: Config) -> None:
    if config.trainer.lora and find_spec("peft") is None:
        raise ConfigError(PEFT_MISSING)


class Preflight:
    """The checks of one config, and the model's assets once they are read."""

    def __init__(self, config: Config) -> None:
        self.assets: ModelAssets | None = None
        self._config = config
        self._rewards: list[LoadedReward] = []
        self._trials: list[Trial] = []

    def checks(self) -> Iterator[Check]:
        """Yield every check, in order; each raises ConfigError."""
        config = self._config
        yield from (partial(self._reward, entry) for entry in config.reward.functions)
        yield self._reward_names
        yield self._user_functions
        yield self._model
        sections = {"dataset": config.dataset}
        sections |= {f"evaluation.datasets[{e.name}].dataset": e.dataset for e in config.evaluation.datasets}
        yield from (partial(self._dataset, section, dataset) for section, dataset in sections.items())
        yield from (partial(_refuse, problem) for problem in self._reward_problems())

    def _reward(self, entry: RewardFunction) -> None:
        from sluice.workers.rewards.loading import load_reward_functions

        self._rewards += load_reward_functions([entry], code_folder=self._config.code_folder)

    def _reward_names(self) -> None:
        from sluice.workers.rewards.loading import refuse_equal_names

        refuse_equal_names(self._rewards)
        names = [reward.name for reward in self._rewards]
        if len(names) < len(self._config.reward.functions):
            return  # the name may be that of a function that could not be loaded
        for judged in self._config.evaluation.datasets:
            if judged.function not in (None, *names):
                raise ConfigError(
                    f"evaluation.datasets[{judged.name}].function = {judged.function!r} is not a reward function of this run: "
                    f"use one of {', '.join(names)}"
                )

    def _user_functions(self) -> None:
        if self._config.trainer.has_user_functions:
            from sluice.trainer.objective import check_functions  # torch loads here

            check_functions(self._config.trainer)

    def _model(self) -> None:
        from sluice.common.models.assets import read_assets

        self.assets = read_assets(self._config.model.path, revision=self._config.model.revision)

    def _dataset(self, section: str, dataset: DatasetConfig) -> None:
        from sluice.workers.prompt_source import PromptSource
        from sluice.workers.rewards.trial import Trial

        tokenizer = self.assets.tokenizer() if self.assets else None
        with closing(PromptSource(dataset, tokenizer, seed=self._config.seed, section=section)) as source:
            source.check_columns()
            if tokenizer and (prompt := source.first_prompt()):
                self._trials.append(Trial.of(prompt, tokenizer, section=section))

    def _reward_problems(self) -> list[str]:
        """Call every reward function once, where all of them and a prompt could be loaded."""
        from sluice.workers.rewards.trial import try_rewards

        is_complete = self._trials and len(self._rewards) == len(self._config.reward.functions)
        return try_rewards(self._config, self._trials) if is_complete else []


def _refuse(problem: str) -> None:
    raise ConfigError(problem)
