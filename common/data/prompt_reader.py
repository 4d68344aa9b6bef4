"""Dataset rows by cursor, their cells as JSON values, and prompts as token ids: what RL and supervised training read alike.

    row of the dataset -- dataset.function --> row, or left out -- prompt_column or prompt_template --> prompt --> token ids

Columns of images, audio, video and bytes are left out, and the log names them; dates and decimals become text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sluice.common.config import PromptConfig
from sluice.common.config.template import fill_template, template_columns
from sluice.common.data.rows import open_rows, short_reason
from sluice.common.data.text_files import Row
from sluice.common.errors import ConfigError, did_you_mean, raised_at
from sluice.common.loading import add_code_folder, find_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyPromptConfig = TypeVar("AnyPromptConfig", bound=PromptConfig)

MAX_DEPTH = 100
"""Of lists and objects in a cell: msgpack and JSON have bounds of their own, some hundred more."""
LOOKED_AT = 64
"""Rows among which a first one is looked for that is not left out, before anything starts."""


class PromptReader(Generic[AnyPromptConfig]):
    """Rows by cursor, and their cells. Not thread-safe."""

    def __init__(
        self,
        config: AnyPromptConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        seed: int,
        section: str = "dataset",
        code_folder: str | None = None,
    ) -> None:
        """`section` is the config section that errors name. Raises ConfigError: not found, unreadable, empty.

        tokenizer: none = rows and cells only. code_folder: where a dotted path of dataset.function is found.
        """
        self._config = config
        self._tokenizer: Any = tokenizer
        self._section = section
        self._source = f"{section}.path = {config.path!r}"
        self._function: Callable[[Row], Any] | None = None
        if config.function is not None:
            add_code_folder(code_folder)
            self._function = find_function(config.function, where=f"{section}.function")
        self._rows = open_rows(config, seed=seed, section=section)

    @property
    def left_out(self) -> Sequence[str]:
        """Columns that no row has here, since they hold images, audio or bytes."""
        return self._rows.left_out

    @property
    def num_rows(self) -> int | None:
        """Rows per epoch; none for a stream."""
        return self._rows.num_rows

    def epoch_of(self, cursor: int) -> int:
        """Return the epochs completed before this cursor; 0 for a stream whose end this worker has not yet reached."""
        return self._rows.epoch_of(cursor)

    def close(self) -> None:
        """Release a stream's open file: a Parquet stream still open at interpreter exit prints a traceback."""
        self._rows.close()

    def row_at(self, cursor: int) -> tuple[Row | None, str]:
        """Return the row that the cursor names, none where dataset.function leaves it out, and its location in words."""
        row, where = self._rows.row_at(cursor)
        return (row if self._function is None else self._made_of(row, where)), where

    def _made_of(self, row: Row, where: str) -> Row | None:
        """Call the user's function. Raises ConfigError where it raises, or returns no row."""
        assert self._function is not None
        what = f"{self._section}.function = {self._config.function!r}"
        try:
            made = self._function(dict(row))
        except Exception as error:  # user code
            place = f" at {found}" if (found := raised_at(error)) else ""
            raise ConfigError(
                f"{what} raised {type(error).__name__}: {short_reason(error)}{place}, for {where} of {self._source}"
            ) from error
        if made is None or isinstance(made, dict):
            return made
        raise ConfigError(
            f"{what} returned {type(made).__name__} for {where} of {self._source}: return the row as a dictionary, or None to "
            "leave it out"
        )

    def check_columns(self) -> None:
        """Check that the first row has every column that the config names. Raises ConfigError, which names all it lacks."""
        row, where = next((found for found in map(self.row_at, range(LOOKED_AT)) if found[0] is not None), (None, ""))
        if row is None:
            return
        problems = []
        for key, column in self._columns():
            try:
                self.cell(row, key, where, column=column)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("; ".join(problems))

    def _columns(self) -> list[tuple[str, str]]:
        """Return the columns that must be there, each with the config key that names it."""
        config, template = self._config, self._config.prompt_template
        keys = [
            key for key in type(config).model_fields if key.endswith("_column") and getattr(config, key) is not None
        ]
        if template is None:
            return [(key, getattr(config, key)) for key in keys]
        named = [("prompt_template", column) for column in template_columns(template)]
        return [*named, *((key, getattr(config, key)) for key in keys if key != "prompt_column")]

    def prompt(self, row: Row, where: str) -> Any:
        """Return the prompt of a row: its column, or the template filled with its columns. Raises ConfigError."""
        template, key = self._config.prompt_template, "prompt_template"
        if template is None:
            return self.cell(row, "prompt_column", where)
        cells = {name: self.cell(row, key, where, column=name) for name in template_columns(template)}
        return fill_template(template, {name: as_text(value) for name, value in cells.items()})

    def cell(self, row: Row, key: str, where: str, *, column: str | None = None) -> Any:
        """Return the value of the column that the config key names; never None. Raises ConfigError.

        column: one of several that the key names.
        """
        column = column or getattr(self._config, key)
        if column in self.left_out:
            raise ConfigError(
                f"{self._section}.{key} = {column!r}: in {self._source} it is images, audio or bytes, not text"
            )
        if column not in row:
            hint = did_you_mean(column, row) or f"set {self._section}.{key} to one of them"
            if len(row) == 1 and set(";\t|") & set(next(iter(row))):
                hint = "the cells of a .csv are separated by commas, those of a .tsv by tabs"
            raise ConfigError(
                f"{self._section}.{key} = {column!r}: {self._source}, {where}, has the columns {', '.join(row)}; {hint}"
            )
        if row[column] is None:
            raise ConfigError(f"{self._source}, {where}: column {column!r} ({key}) is null; fill in or remove that row")
        return self.value(row, column, where)

    def value(self, row: Row, column: str, where: str) -> Any:
        """Return the value of a column in the types of JSON. Raises ConfigError where it has none in them."""
        try:
            _plain(column)
            return _plain(row[column])
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self._source}, {where}: column {column!r}: {error}; correct or remove that row"
            ) from None

    def prompt_ids(self, prompt: Any, where: str) -> list[int]:
        """Return token ids of a prompt: by the chat template where it is wanted and exists, as plain text otherwise."""
        system = self._config.system_prompt
        templated = self._config.chat_template and bool(self._tokenizer.chat_template)
        if isinstance(prompt, str) and not templated:
            ids = self._text_ids(prompt if system is None else f"{system}\n\n{prompt}")
        else:
            messages = self._messages(prompt, where, templated=templated)
            try:
                text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates raise any exception, e.g. where a model knows no system role
                raise ConfigError(
                    f"{self._source}, {where}: the chat template refuses it: {short_reason(error)}"
                ) from None
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has added them
        if not ids:
            raise ConfigError(f"{self._source}, {where}: the prompt is empty; fill in or remove that row")
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Tokenize without what some tokenizers put behind a text (an end token): a completion continues the prompt."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        bare: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [
            start + len(bare) for start in range(len(ids) - len(bare) + 1) if ids[start : start + len(bare)] == bare
        ]
        return ids[: ends[0]] if bare and ends else ids

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


def as_text(value: Any) -> str:
    """Return the text of a cell; of a number, a list or an object its JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any, depth: int = 0) -> Any:
    """Return the value in the types of JSON and msgpack. Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair, which JSON can spell, is in no text that a tokenizer or Redis takes
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("bytes have no form in JSON")
    return str(value)
