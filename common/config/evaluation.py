"""Config of what an evaluation set measures; `sluice.common.config.schema` adds where its prompts come from."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from sluice.common.config.trainer import Section

DEFAULT_ANSWER = r"(?s)<answer>(.*?)</answer>"
"""The pattern of MathReward."""


class EvalScores(Section):
    """What is measured on each prompt of an evaluation set, and what counts as correct."""

    num_samples: int = Field(default=0, ge=0)
    """Samples per prompt besides the greedy completion, drawn as `sampling` says; 0 = greedy only."""
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Every k whose pass@k is estimated from the samples (k = 1 is `sampled_pass@1`: `pass@1` is greedy); none = 1 and
    num_samples."""
    answer: str = DEFAULT_ANSWER
    """Regular expression whose first match and group holds a completion's answer, for the majority vote of the samples."""
    correct_if: float = 1.0
    """A completion is correct when the reward function named in `function` gives at least this."""
    function: str | None = None
    """Name of the reward function that decides; none = the first."""

    @property
    def estimated(self) -> dict[str, int]:
        """Score -> k, for every pass@k that is estimated from the samples."""
        every_k = self.pass_at or tuple(sorted({1, self.num_samples} - {0}) if self.num_samples else ())
        return {"sampled_pass@1" if k == 1 else f"pass@{k}": k for k in every_k}

    @property
    def vote(self) -> str | None:
        """Score of the majority vote over all samples; none with fewer than two."""
        return f"maj@{self.num_samples}" if self.num_samples > 1 else None

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of its shares of correct answers, in metrics eval/<name>/<score>."""
        return ("pass@1", *self.estimated, *filter(None, [self.vote]))

    @model_validator(mode="after")
    def _samples_suffice(self) -> EvalScores:
        if len(set(self.pass_at)) != len(self.pass_at):
            raise ValueError(f"pass_at: values must differ, got {list(self.pass_at)}")
        if self.pass_at and max(self.pass_at) > self.num_samples:
            raise ValueError(
                f"pass_at = {list(self.pass_at)} needs num_samples of at least {max(self.pass_at)}, found {self.num_samples}"
            )
        if self.answer != DEFAULT_ANSWER and self.vote is None:
            raise ValueError("answer has no effect with num_samples under 2: there is no majority vote")
        try:
            num_parts = re.compile(self.answer).groups
        except re.error as error:
            raise ValueError(f"answer = {self.answer!r} is not a regular expression: {error}") from None
        if num_parts == 0:
            raise ValueError(f"answer = {self.answer!r} has no group: put the answer into parentheses")
        return self
