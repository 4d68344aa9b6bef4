"""What a run needs, checked before anything is started or stored: every bad input ends here, with exit code 2.

`preflight` stops at the first problem, `sluice doctor` lists them all: a check that does not need what failed before it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

from sluice.common.config import Config, DatasetConfig, RewardFunction
from sluice.common.config.trainer import PEFT_MISSING
from sluice.common.errors import ConfigError, SluiceError
from sluice.common.parent import ended_by_ctrl_c
from sluice.common.paths import check_folder
from sluice.scripts.launcher.roles import check_gpus
from sluice.trainer.trackers import check_trackers

if TYPE_CHECKING:  # imported where they are used: `sluice run` forks before their libraries are loaded
    from sluice.common.models.assets import ModelAssets
    from sluice.workers.rewards.loading import LoadedReward
    from sluice.workers.rewards.trial import Trial

Check = Callable[[], None]
log = logging.getLogger(__name__)


def preflight(config: Config) -> dict[str, object]:
    """Check everything that a run will need; return the model's assets. Raises ConfigError."""
    found = Preflight(config)
    with ended_by_ctrl_c():
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


def check_model(config: Config, assets: ModelAssets) -> None:
    """Check engine and trainer on every kind of row that the run may have, on a small copy with random weights.

    Raises ConfigError for a model that would be wrong in silence (common/models/probe.py).
    """
    from sluice.common.models.tiny import tiny_model  # torch loads here

    # isort: split
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from sluice.common.models.logprobs import check_scoring
    from sluice.common.models.probe import EXACT, one_line
    from sluice.workers.engine.torch.probe import check_decoding

    model_type = assets.config.get("model_type")
    torch.set_num_threads(1)  # the copy is small: threads would wait for each other, the longer the busier the machine
    try:
        if assets.config.get("is_encoder_decoder"):
            raise ConfigError(
                f"{model_type} is an encoder-decoder, and nothing here runs an encoder; use a decoder alone"
            )
        if type(AutoConfig.for_model(**assets.config)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = "is multimodal: save its language model alone" if "text_config" in assets.config else "is none"
            raise ConfigError(f"transformers does not load {model_type} as a causal language model; it {kind}")
        model = tiny_model(assets)
        if model is None:
            log.info("%s has no small copy: the roles check the model when they load it", config.model.path)
            return
        if config.rollout.engine == "torch":
            max_model_len = config.rollout.max_model_len or config.trainer.seq_len
            check_decoding(model, max_model_len=max_model_len, bound=EXACT)
        check_scoring(model, longest=config.trainer.seq_len, bound=EXACT)
    except ConfigError as error:
        raise ConfigError(f"model.path = {config.model.path!r}: {error}") from error
    except Exception as error:  # whatever an unusual model makes transformers raise
        raise ConfigError(
            f"model.path = {config.model.path!r}: {model_type} cannot be built: {one_line(error)}"
        ) from error


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
        yield partial(check_folder, "output_dir", config.output_dir)
        if config.policy_store.path is not None and config.policy_store.transport == "directory":
            yield partial(check_folder, "policy_store.path", config.policy_store.path)
        yield from (partial(self._reward, entry) for entry in config.reward.functions)
        yield self._reward_names
        yield self._user_functions
        yield self._model
        yield self._exactness
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

    def _exactness(self) -> None:
        if self.assets is not None:
            check_model(self._config, self.assets)

    def _dataset(self, section: str, dataset: DatasetConfig) -> None:
        from sluice.workers.prompt_source import PromptSource
        from sluice.workers.rewards.trial import Trial

        tokenizer = self.assets.tokenizer() if self.assets else None
        code_folder = self._config.code_folder
        source = PromptSource(dataset, tokenizer, seed=self._config.seed, section=section, code_folder=code_folder)
        with closing(source):
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
