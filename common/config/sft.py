"""Config of supervised training (`sluice sft`): data only, frozen, like `common.config.schema`, whose sections it shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sluice.common.config import ModelConfig, PromptConfig
from sluice.common.config.trainer import Section, TrainerConfig
from sluice.common.config.yaml_text import dump_yaml
from sluice.common.paths import PathKind

RL_ONLY = (
    "num_iterations", "advantage", "filter_zero_variance", "max_refill", "skip_zero_gradient", "loss", "objective",
    "mask_truncated", "overlong_penalty", "parallel", "stall_report_s", "max_lost_batches", "max_dropped_epochs",
)  # fmt: skip
"""Keys of `trainer` that have no effect here, in one process and without rewards; setting one is refused."""


class ExamplesConfig(PromptConfig):
    completion_column: str | None = "completion"
    """Column with what is learned: text, or a list of one assistant message. None = `prompt_column` holds full
    conversations, of which the last turn, the assistant's, is learned."""

    @model_validator(mode="after")
    def _has_a_completion(self) -> ExamplesConfig:
        if self.completion_column is None and self.prompt_template is not None:
            raise ValueError("prompt_template has no effect on full conversations: set completion_column, or remove it")
        return self


class HeldOutConfig(Section):
    dataset: ExamplesConfig
    """Examples that are not trained on; never shuffled."""
    num_examples: int | None = Field(default=None, ge=1)
    """Rows used, from the first on; none = all."""
    every_steps: int = Field(default=0, ge=0)
    """Steps between measurements, besides those before and after training; 0 = only those two."""

    @model_validator(mode="after")
    def _ends(self) -> HeldOutConfig:
        if self.dataset.streaming and self.num_examples is None:
            raise ValueError("a streaming set needs num_examples")
        return self


class SftCheckpointConfig(Section):
    every_steps: int = Field(default=100, ge=1)
    """Steps between durable checkpoints; one more is written at the end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class SftConfig(Section):
    """One supervised training."""

    seed: int = Field(default=0, ge=0)
    """Seed of the order of the examples."""
    output_dir: Annotated[str, PathKind.FOLDER] = "runs"
    """Run folders are made under it."""
    model: ModelConfig
    """The model to begin with."""
    dataset: ExamplesConfig
    """Examples; those over trainer.seq_len tokens are skipped and counted."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer step."""
    num_epochs: int | None = Field(default=None, ge=1)
    """Passes over the examples of a table that are not skipped, instead of trainer.num_steps: all rows are read once to count
    them. The last step may reach into the next pass."""
    trainer: TrainerConfig = TrainerConfig()
    """Optimisation: as in a run, without the keys that only RL has."""
    checkpoint: SftCheckpointConfig = SftCheckpointConfig()
    """Durable state."""
    held_out: HeldOutConfig | None = None
    """Held-out loss; none = not measured."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> SftConfig:
        if idle := [name for name in RL_ONLY if name in self.trainer.model_fields_set]:
            raise ValueError(f"trainer.{idle[0]} has no effect in supervised training: remove it")
        if self.num_epochs is not None and "num_steps" in self.trainer.model_fields_set:
            raise ValueError("num_epochs and trainer.num_steps both set the end: set one of them")
        return self

    def for_examples(self, num_examples: int) -> SftConfig:
        """Return the same config with `num_epochs` turned into steps over `num_examples`."""
        if self.num_epochs is None:
            return self
        trainer = self.trainer.model_copy(update={"num_steps": -(-num_examples * self.num_epochs // self.batch_size)})
        return self.model_copy(update={"num_epochs": None, "trainer": trainer})

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, with every default."""
        data = self.model_dump(mode="json", exclude={"trainer": set(RL_ONLY)})
        return dump_yaml(data)
