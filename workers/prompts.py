"""Prompts of a run: dataset rows by cursor, as token ids with what the reward functions need.

A target is the text after the last `target_delimiter` of its column. The other columns travel to the reward functions
as JSON values: dates and decimals become text; images, audio, video and binary columns are left out.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config import DatasetConfig
from common.errors import ConfigError
from workers.rows import open_rows, short_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    "all columns but the prompt's, the target's in full among them; JSON values"


@dataclass(frozen=True, kw_only=True, slots=True)
class TooLong:
    """A row whose prompt exceeds max_req_tokens: to be skipped and counted."""

    cursor: int
    num_tokens: int


class PromptSource:
    """Prompts by cursor. Not thread-safe. Opening it and reading prompt 0 finds every mistake in the config."""

    def __init__(
        self, config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, section: str = "dataset"
    ) -> None:
        """`section` is the config section that errors name. Raises ConfigError: not found, unreadable, empty."""
        self._config = config
        self._tokenizer = tokenizer
        self._section = section
        self._source = f"{section}.path = {config.path!r}"
        self._rows = open_rows(config, seed=seed, section=section)

    @property
    def num_rows(self) -> int | None:
        """Rows per epoch; none for a stream."""
        return self._rows.num_rows

    def epoch_of(self, cursor: int) -> int:
        """Epochs completed before this cursor; 0 for a stream of which this worker has not yet met the end."""
        return self._rows.epoch_of(cursor)

    def prompt_at(self, cursor: int) -> Prompt | TooLong:
        """The prompt that the cursor names. Raises ConfigError, naming row and column, where the row does not fit."""
        row, where = self._rows.row_at(cursor)
        prompt = self._cell(row, "prompt_column", where)
        prompt_ids = self._encode(prompt, where)
        if len(prompt_ids) > self._config.max_req_tokens:
            return TooLong(cursor=cursor, num_tokens=len(prompt_ids))
        return Prompt(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
            prompt=prompt,
            target=None if self._config.target_column is None else self._target(row, where),
            columns={name: _plain(value) for name, value in row.items() if name != self._config.prompt_column},
        )

    def close(self) -> None:
        """Let go of a stream's open file: a Parquet stream still open at interpreter exit prints a traceback."""
        self._rows.close()

    def _cell(self, row: dict[str, Any], key: str, where: str) -> Any:
        """Value of the column that the config key names; never None."""
        column = getattr(self._config, key)
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"set {self._section}.{key} to one of them"
            raise ConfigError(
                f"{self._section}.{key} = {column!r}: {self._source} has the columns {', '.join(row)}; {hint}"
            )
        if row[column] is None:
            raise ConfigError(f"{self._source}, {where}: column {column!r} ({key}) is null; fill in or remove that row")
        return _plain(row[column])

    def _target(self, row: dict[str, Any], where: str) -> str:
        """The target's text; a column of numbers or lists gives their JSON."""
        value = self._cell(row, "target_column", where)
        text = value if isinstance(value, str) else json.dumps(value)
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

    def _encode(self, prompt: Any, where: str) -> list[int]:
        """Token ids of a prompt: by the chat template where it is wanted and there is one, as plain text otherwise."""
        system = self._config.system_prompt
        templated = self._config.chat_template and bool(self._tokenizer.chat_template)
        if isinstance(prompt, str) and not templated:
            ids = self._tokenizer(prompt if system is None else f"{system}\n\n{prompt}")["input_ids"]
        else:
            messages = self._messages(prompt, where, templated=templated)
            try:
                text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates raise what they like, e.g. where a model knows no system role
                raise ConfigError(
                    f"{self._source}, {where}: the chat template refuses it: {short_reason(error)}"
                ) from None
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
        if not ids:
            raise ConfigError(f"{self._source}, {where}: the prompt is empty; fill in or remove that row")
        return ids

    def _messages(self, prompt: Any, where: str, *, templated: bool) -> list[dict[str, Any]]:
        system = self._config.system_prompt
        if isinstance(prompt, str):
            first = [] if system is None else [{"role": "system", "content": system}]
            return [*first, {"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
        ):
            raise ConfigError(
                f"{self._source}, {where}: column {self._config.prompt_column!r} holds {type(prompt).__name__}; "
                "a prompt is text or a list of messages with role and content"
            )
        if not templated:
            raise ConfigError(
                f"{self._source} has chat messages as prompts, which need a chat template: "
                f"{'set chat_template to true' if self._tokenizer.chat_template else 'the tokenizer has none'}"
            )
        if system is not None:
            raise ConfigError(
                f"{self._section}.system_prompt has no effect on prompts that are chat messages: put it into the "
                f"messages of {self._source} and remove the key"
            )
        return prompt


def _plain(value: Any) -> Any:
    """The value as JSON and msgpack know it."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
