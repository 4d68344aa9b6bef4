"""What a run needs, checked before anything is started or stored: every bad input ends here, with exit code 2."""

from __future__ import annotations

from sluice.common.config import Config
from sluice.common.errors import ConfigError


def preflight(config: Config) -> dict[str, object]:
    """Check everything that a run will need; return the model's assets. Raises ConfigError."""
    from sluice.common.models.assets import read_assets
    from sluice.workers.prompt_source import PromptSource
    from sluice.workers.rewards.loading import load_reward_functions

    rewards = [reward.name for reward in load_reward_functions(config.reward.functions, code_folder=config.code_folder)]
    for judged in config.evaluation.datasets:
        if judged.function not in (None, *rewards):
            raise ConfigError(
                f"evaluation.datasets[{judged.name}].function = {judged.function!r} is not a reward function of this run: use "
                f"one of {', '.join(rewards)}"
            )
    if config.trainer.has_user_functions:
        from sluice.trainer.objective import check_functions  # torch loads here

        check_functions(config.trainer)
    assets = read_assets(config.model.path, revision=config.model.revision)
    tokenizer = assets.tokenizer()
    sections = {"dataset": config.dataset}
    sections |= {f"evaluation.datasets[{e.name}].dataset": e.dataset for e in config.evaluation.datasets}
    for section, dataset in sections.items():
        source = PromptSource(dataset, tokenizer, seed=config.seed, section=section)
        source.prompt_at(0)
        source.close()
    return assets.to_wire()
