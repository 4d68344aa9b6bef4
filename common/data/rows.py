"""Rows of a dataset in a seeded order, addressed by one counter.

The cursor counts prompts since the start of the run, over all dataset workers; a worker sees some of its values, mostly
growing. What a cursor names depends on the config and the seed alone, so any worker may serve it and a run resumes
exactly:

    table    epoch, i = divmod(cursor, num_rows); the row is permutation(seed, epoch)[i], or row i without shuffle.
    stream   epoch and i likewise, once the end of the first epoch has been reached; epoch 0 and i = cursor before. The
             row is number i of the stream, shuffled in a window with (seed, epoch). The worker reads forward to it from
             its own position, over rows that others use; a lower i starts the stream again.

The window is our own: the order of IterableDataset.shuffle changes between versions of datasets, and 5.2 sleeps 5 s
whenever a shuffled Parquet stream ends. Shards are read in the order in which they are listed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from sluice.common.config import PromptConfig
from sluice.common.errors import ConfigError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What datasets 5.2 reports for a JSON or CSV file, and for a Parquet file, without rows.
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
_log = logging.getLogger(__name__)


def open_rows(config: PromptConfig, *, seed: int, section: str) -> Table | Stream:
    """Open the configured dataset; errors name the config `section`. Raises ConfigError: not found, unreadable, empty."""
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it calls S3 also for local files
    source = f"{section}.path = {config.path!r}"
    arguments = _load_arguments(config, section, source)
    try:
        rows: Any = datasets.load_dataset(**arguments, split=config.split, streaming=config.streaming)
    except Exception as error:  # its readers raise many kinds; each means that what the config names cannot be read
        raise _unreadable(source, error) from None
    if media := [name for name, feature in (rows.features or {}).items() if _is_media(feature)]:
        rows = rows.remove_columns(media)
    order = seed if config.shuffle else None
    if config.streaming:
        return Stream(rows, source=source, seed=order, window=config.shuffle_buffer)
    return Table(rows, source=source, seed=order)


class Table:
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
        """Return the row, and its location in words."""
        epoch, index = divmod(cursor, self.num_rows)
        if self._seed is not None:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
            index = int(self._order[1][index])
        return self._rows[index], f"row {index}"

    def close(self) -> None:
        """Do nothing: no file is held open."""


class Stream:
    """Rows in order only; see the module's docstring for how a cursor is found."""

    num_rows = None

    def __init__(self, rows: Iterable[dict[str, Any]], *, source: str, seed: int | None, window: int) -> None:
        self._rows = rows
        self._source = source
        self._seed = seed
        self._window = window
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._epoch = -1
        self._position = 0
        self._length: int | None = None
        self._has_read = False

    def epoch_of(self, cursor: int) -> int:
        return 0 if self._length is None else cursor // self._length

    def row_at(self, cursor: int) -> tuple[dict[str, Any], str]:
        """Return the row, and its location in words. Raises what the reader raises; the stream then starts again."""
        while True:
            epoch = self.epoch_of(cursor)
            index = cursor - epoch * (self._length or 0)
            if epoch != self._epoch or index < self._position:
                self._start(epoch)
            row = self._read_up_to(index)
            if row is not None:
                return row, f"row {index} of epoch {epoch} of the stream"
            if self._position == 0:
                raise _empty(self._source)
            self._length = self._position  # the end of the epoch: the cursor is in a later one

    def close(self) -> None:
        """Release the open file; `row_at` opens it again."""
        self._iterator, self._epoch = iter(()), -1

    def _start(self, epoch: int) -> None:
        self._iterator, self._epoch, self._position = iter(self._rows), epoch, 0
        if self._seed is not None:
            self._iterator = _window_shuffle(
                self._iterator, window=self._window, rng=np.random.default_rng([self._seed, epoch])
            )

    def _read_up_to(self, index: int) -> dict[str, Any] | None:
        """Return row `index` of the current epoch, or None where it ends before."""
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


def _window_shuffle(
    rows: Iterator[dict[str, Any]], *, window: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yield, for each row read, a random one of the window; what is left at the end comes in random order."""
    held: list[dict[str, Any]] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
        else:
            i = int(rng.integers(window))
            yield held[i]
            held[i] = row
    for i in rng.permutation(len(held)):
        yield held[i]


def _load_arguments(config: PromptConfig, section: str, source: str) -> dict[str, Any]:
    local = Path(config.path).expanduser()
    if local.exists() and config.revision is not None:
        _log.warning("%s.revision has no effect: %s is on this machine", section, local)
    if local.is_file():
        if local.suffix not in _BUILDERS:
            known = ", ".join(_BUILDERS)
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


def _empty(source: str) -> ConfigError:
    return ConfigError(f"{source} has no rows: check the file, or name another split")


def _unreadable(source: str, error: Exception) -> ConfigError:
    reason = short_reason(error)
    if isinstance(error, StopIteration) or any(sign in reason for sign in _NO_ROWS):
        return _empty(source)
    return ConfigError(f"{source} cannot be read: {reason} (check path, name, revision and split)")


def short_reason(error: BaseException) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
