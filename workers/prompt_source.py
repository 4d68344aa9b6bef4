"""Prompts of a run: dataset rows by cursor, as token ids with what the reward functions need.

A target is the text after the last `target_delimiter` of its column. The other columns travel to the reward functions
as JSON values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.common.config import DatasetConfig
from sluice.common.data.prompt_reader import LOOKED_AT, PromptReader, as_text
from sluice.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row, ready to be generated from and scored."""

    prompt_ids: NDArray[np.int32]
    "[P], P <= max_req_tokens"
    prompt: str | list[dict[str, Any]]
    "the column as it is in the dataset: text, or chat messages"
    target: str | None
    "what the answer is compared with; none where no target column is configured"
    columns: dict[str, Any]
    "all columns but the prompt's, including the target's in full and those of a template; JSON values"


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLong:
    """A row whose prompt exceeds max_req_tokens: to be skipped and counted."""

    cursor: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A row that dataset.function leaves out: to be skipped and counted."""

    cursor: int


class PromptSource(PromptReader[DatasetConfig]):
    """Prompts by cursor. Not thread-safe. Opening it and reading prompt 0 finds every mistake in the config."""

    @property
    def max_req_tokens(self) -> int:
        """Bound on the tokens of a prompt."""
        return self._config.max_req_tokens

    def prompt_at(self, cursor: int) -> Prompt | TooLong | LeftOut:
        """Return the prompt that the cursor names. Raises ConfigError, naming row and column, where the row is not valid."""
        row, where = self.row_at(cursor)
        if row is None:
            return LeftOut(cursor=cursor)
        prompt = self.prompt(row, where)
        used = self._config.prompt_column if self._config.prompt_template is None else None
        prompt_ids = self.prompt_ids(prompt, where)
        if len(prompt_ids) > self._config.max_req_tokens:
            return TooLong(cursor=cursor, num_tokens=len(prompt_ids))
        return Prompt(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
            prompt=prompt,
            target=None if self._config.target_column is None else self._target(row, where),
            columns={name: self.value(row, name, where) for name in row if name != used},
        )

    def first_prompt(self) -> Prompt | None:
        """Return the first prompt that is not skipped; None where the first 64 are. Raises ConfigError."""
        return next((each for each in map(self.prompt_at, range(LOOKED_AT)) if isinstance(each, Prompt)), None)

    def _target(self, row: dict[str, Any], where: str) -> str:
        """Return the target's text; of a number or a list, its JSON."""
        text = as_text(self.cell(row, "target_column", where))
        delimiter = self._config.target_delimiter
        if delimiter is None:
            return text
        _, found, answer = text.rpartition(delimiter)
        if not found:
            raise ConfigError(
                f"{self._source}, {where}: column {self._config.target_column!r} lacks the delimiter {delimiter!r}, "
                f"it ends with {text[-60:]!r}; correct {self._section}.target_delimiter or remove that row"
            )
        return answer.strip()
