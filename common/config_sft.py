"""Config of supervised training (`sluice sft`): data only, frozen, like `common.config`, whose sections it shares."""

from __future__ import annotations

import yaml
from pydantic import Field, model_validator

from common.config import CheckpointConfig, ModelConfig, PromptConfig
from common.config_trainer import Section, TrainerConfig

RL_ONLY = (
    "num_iterations", "advantage", "filter_zero_variance", "max_refill", "loss", "mask_truncated", "overlong_penalty",
    "parallel", "stall_report_s",
)  # fmt: skip
"""Keys of `trainer` that nothing reads here, in one process and without rewards; setting one is refused."""


class ExamplesConfig(PromptConfig):
    completion_column: str | None = "completion"
    """Column with what is learnt: text, or a list of one assistant message. None = `prompt_column` holds whole
    conversations, of which the last turn, the assistant's, is learnt."""


class HeldOutConfig(Section):
    dataset: ExamplesConfig
    """Examples that are not trained on; never shuffled."""
    num_examples: int | None = Field(default=None, ge=1)
    """First so many rows; none = all."""
    every_steps: int = Field(default=0, ge=0)
    """Measure every so many steps, besides before and after training; 0 = only those two."""

    @model_validator(mode="after")
    def _ends(self) -> HeldOutConfig:
        if self.dataset.streaming and self.num_examples is None:
            raise ValueError("a streaming set needs num_examples")
        return self


class SftConfig(Section):
    """One supervised training."""

    seed: int = Field(default=0, ge=0)
    """Seed of the order of the examples, and of dropout."""
    output_dir: str = "runs"
    """Run folders are made under it."""
    model: ModelConfig
    """The model to begin with."""
    dataset: ExamplesConfig
    """Examples; those over trainer.seq_len tokens are skipped and counted."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer step."""
    num_epochs: int | None = Field(default=None, ge=1)
    """Passes over the dataset, in place of trainer.num_steps; the last step may reach into the next one."""
    trainer: TrainerConfig = TrainerConfig()
    """Optimisation: as in a run, without what is RL's alone."""
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=100)
    """Durable state."""
    held_out: HeldOutConfig | None = None
    """Held-out loss; none = not measured."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> SftConfig:
        if idle := [name for name in RL_ONLY if name in self.trainer.model_fields_set]:
            raise ValueError(f"trainer.{idle[0]} has no effect in supervised training: remove it")
        if self.checkpoint.keep_best is not None:
            raise ValueError("checkpoint.keep_best reads evaluations of a run and has no effect in supervised training")
        if self.num_epochs is not None and "num_steps" in self.trainer.model_fields_set:
            raise ValueError("num_epochs and trainer.num_steps both say when to end: set one of them")
        return self

    def for_rows(self, num_rows: int) -> SftConfig:
        """The same with `num_epochs` turned into steps over a dataset of so many rows."""
        if self.num_epochs is None:
            return self
        trainer = self.trainer.model_copy(update={"num_steps": -(-num_rows * self.num_epochs // self.batch_size)})
        return self.model_copy(update={"num_epochs": None, "trainer": trainer})

    def to_yaml(self) -> str:
        """The resolved config, every default spelled out."""
        data = self.model_dump(mode="json", exclude={"trainer": set(RL_ONLY)})
        return yaml.safe_dump(data, sort_keys=False)
