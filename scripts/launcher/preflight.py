"""What a run needs, checked before anything is started or stored: every bad input ends here, with exit code 2."""

from __future__ import annotations

from sluice.common.config import Config
from sluice.common.errors import ConfigError

_FIRST_PROMPTS = 64
"""Of these, the first that is not too long is a trial's prompt."""
_SHORT = "No."


def preflight(config: Config) -> dict[str, object]:
    """Check everything that a run will need; return the model's assets. Raises ConfigError."""
    from sluice.common.models.assets import read_assets
    from sluice.workers.prompt_source import Prompt, PromptSource
    from sluice.workers.rewards.loading import load_reward_functions
    from sluice.workers.rewards.trial import Trial, try_rewards

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
    trials = []
    for section, dataset in sections.items():
        source = PromptSource(dataset, tokenizer, seed=config.seed, section=section)
        found = (source.prompt_at(cursor) for cursor in range(_FIRST_PROMPTS))
        if prompt := next((each for each in found if isinstance(each, Prompt)), None):
            completions = [_SHORT, prompt.target or "Yes."]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
            trials.append(
                Trial(
                    section=section,
                    prompt=prompt.prompt,
                    target=prompt.target,
                    columns=prompt.columns,
                    completions=completions,
                    completion_ids=ids,
                )
            )
        source.close()
    if problems := try_rewards(config, trials):
        raise ConfigError(" ".join(problems))
    return assets.to_wire()
