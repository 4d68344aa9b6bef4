"""Prompts of a run: the rows of a dataset in a seeded order, addressed by one counter.

The cursor counts prompts since the start of the run, over all dataset workers; a worker sees some of its values, mostly
growing. What a cursor names depends on the config and the seed alone, so any worker may serve it and a run resumes
exactly:

    table    epoch, i = divmod(cursor, num_rows); the row is permutation(seed, epoch)[i], or row i without shuffle.
    stream   epoch and i likewise, once the end of the first epoch has been met; epoch 0 and i = cursor before. The row
             is number i of the stream, shuffled in a window with (seed, epoch). It is reached by reading on from where
             this worker stands, over rows that others took; a lower i starts the stream again.

A target is the text after the last `target_delimiter` of its column. Other columns travel to the reward functions as
JSON values: dates and decimals become text; images, audio, video and binary columns are left out.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from common.config import DatasetConfig
from common.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_log = logging.getLogger(__name__)


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
        rows = _open(config, section)
        self._rows: _Table | _Stream
        if config.streaming:
            if config.shuffle:
                rows = rows.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
            self._rows = _Stream(rows, source=self._source)
        else:
            self._rows = _Table(rows, source=self._source, seed=seed if config.shuffle else None)

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
                f"{self._source}, {where}: column {self._config.target_column!r} lacks the delimiter {delimiter!r}, it reads "
                f"{text[-60:]!r}; correct {self._section}.target_delimiter or remove that row"
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
                raise ConfigError(f"{self._source}, {where}: the chat template refuses it: {_reason(error)}") from None
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
                f"{self._source}, {where}: column {self._config.prompt_column!r} holds {type(prompt).__name__}; a prompt is "
                "text or a list of messages with role and content"
            )
        if not templated:
            raise ConfigError(
                f"{self._source} has chat messages as prompts, which need a chat template: "
                f"{'set chat_template to true' if self._tokenizer.chat_template else 'the tokenizer has none'}"
            )
        if system is not None:
            raise ConfigError(
                f"{self._section}.system_prompt has no effect on prompts that are chat messages: put it into the messages of "
                f"{self._source} and remove the key"
            )
        return prompt


class _Table:
    """Rows with random access."""

    def __init__(self, rows: Any, *, source: str, seed: int | None) -> None:
        if len(rows) == 0:
            raise _empty(source)
        self.num_rows: int = len(rows)
        self._rows = rows
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def epoch_of(self, cursor: int) -> int:
        return cursor // self.num_rows

    def row_at(self, cursor: int) -> tuple[dict[str, Any], str]:
        epoch, index = divmod(cursor, self.num_rows)
        if self._seed is not None:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            index = int(self._order[1][index])
        return self._rows[index], f"row {index}"


class _Stream:
    """Rows in order only; see the module's docstring for how a cursor is found."""

    num_rows = None

    def __init__(self, rows: Any, *, source: str) -> None:
        self._rows = rows
        self._source = source
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._epoch = -1
        self._position = 0
        self._length: int | None = None
        self._has_read = False

    def epoch_of(self, cursor: int) -> int:
        return 0 if self._length is None else cursor // self._length

    def row_at(self, cursor: int) -> tuple[dict[str, Any], str]:
        while True:
            epoch = self.epoch_of(cursor)
            index = cursor - epoch * (self._length or 0)
            if epoch != self._epoch or index < self._position:
                self._rows.set_epoch(epoch)
                self._iterator, self._epoch, self._position = iter(self._rows), epoch, 0
            row = self._read_up_to(index)
            if row is not None:
                return row, f"row {index} of epoch {epoch} of the stream"
            if self._position == 0:
                raise _empty(self._source)
            self._length = self._position  # the end of the epoch: the cursor lies in a later one

    def _read_up_to(self, index: int) -> dict[str, Any] | None:
        """Row `index` of the current epoch, or None where it ends before."""
        try:
            for row in self._iterator:
                self._has_read = True
                self._position += 1
                if self._position > index:
                    return row
        except Exception as error:
            self._epoch = -1  # a broken iterator looks like one at its end
            if self._has_read:
                raise
            raise _unreadable(self._source, error) from None
        return None


def _open(config: DatasetConfig, section: str) -> Any:
    """A datasets.Dataset or IterableDataset. Raises ConfigError."""
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it calls S3 also for local files
    arguments = _load_arguments(config, section)
    try:
        rows = datasets.load_dataset(**arguments, split=config.split, streaming=config.streaming)
    except Exception as error:  # its readers raise many kinds; in each case what the config names cannot be had
        raise _unreadable(f"{section}.path = {config.path!r}", error) from None
    media = [name for name, feature in (rows.features or {}).items() if _is_media(feature)]
    return rows.remove_columns(media) if media else rows


def _load_arguments(config: DatasetConfig, section: str) -> dict[str, Any]:
    local = Path(config.path).expanduser()
    source = f"{section}.path = {config.path!r}"
    known = ", ".join(_BUILDERS)
    if local.exists() and config.revision is not None:
        _log.warning("%s.revision has no effect: %s is on this machine", section, local)
    if local.is_file():
        if local.suffix not in _BUILDERS:
            raise ConfigError(f"{source} is a file of unknown kind: use one of {known}, a folder of them, or a hub id")
        return {"path": _BUILDERS[local.suffix], "data_files": str(local)}
    if local.is_dir():
        if config.name and (local / config.name).is_dir() and not (local / "README.md").is_file():
            return {"path": str(local / config.name)}  # hub layout without the card that lists its configurations
        return {"path": str(local), "name": config.name}
    if local.suffix in _BUILDERS or not _HUB_ID.fullmatch(config.path):
        raise ConfigError(
            f"{source}: no such file or folder (relative paths start at {Path.cwd()}), nor is it a hub id"
        )
    return {"path": config.path, "name": config.name, "revision": config.revision}


def _is_media(feature: Any) -> bool:
    return hasattr(feature, "decode_example") or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _plain(value: Any) -> Any:
    """The value as JSON and msgpack know it."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _empty(source: str) -> ConfigError:
    return ConfigError(f"{source} has no rows: check the file, or name another split")


def _unreadable(source: str, error: Exception) -> ConfigError:
    reason = _reason(error)
    if "BatchSize must be greater than 0" in reason:  # datasets 5.2 on a Parquet file without rows
        return _empty(source)
    return ConfigError(f"{source} cannot be read: {reason} (check path, name, revision and split)")


def _reason(error: BaseException) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
