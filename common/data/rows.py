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

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from numpy.typing import NDArray

from sluice.common.config import PromptConfig
from sluice.common.data.hub import hub_problem, near_path
from sluice.common.data.text_files import Row, TextFile, TextStream, TextTable
from sluice.common.errors import ConfigError
from sluice.common.paths import HUB_ID, cache_problem, expanded

_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_TEXT = ("json", "csv")
"""Files without types of their own: the readers of datasets would infer some."""
# What datasets 5.2 reports for a Parquet file without rows.
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
_ADVICE = {
    "dtype equivalent": "remove the column of that type, or write it as text",
    " times in schema": "two columns have the same name: rename one",
    "FieldRef.Name(": "two columns have the same name: rename one",
}
"""What to do, by a part of what datasets and pyarrow say."""
_log = logging.getLogger(__name__)


def open_rows(config: PromptConfig, *, seed: int, section: str) -> Table | Stream:
    """Open the configured dataset; errors name the config `section`. Raises ConfigError: not found, unreadable, empty."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(
        logging.CRITICAL
    )  # what it logs of a failure is in the exception, and so in our message
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it calls S3 also for local files
    source = f"{section}.path = {config.path!r}"
    rows = _load(config, source)
    left_out = [field.name for field in _schema(rows) if _has_bytes(field.type)]
    if left_out:
        _log.warning("%s: left out, since images, audio and bytes are no JSON: %s", source, ", ".join(left_out))
        rows = rows.remove_columns(left_out)
    order = seed if config.shuffle else None
    if config.streaming:
        return Stream(rows, source=source, seed=order, window=config.shuffle_buffer, left_out=left_out)
    return Table(rows, source=source, seed=order, left_out=left_out)


def _schema(rows: Any) -> Iterable[pa.Field]:
    """Return the Arrow fields of what has types of its own; rows of text files have none."""
    features = getattr(rows, "features", None)
    return () if features is None else features.arrow_schema


def _has_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is, or contains, bytes: as datasets stores images, audio, video and documents."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    nested = [kind.field(i).type for i in range(kind.num_fields)]
    return "binary" in str(kind).split("<")[0] or any(map(_has_bytes, nested))


class Table:
    """Rows with random access."""

    def __init__(self, rows: Any, *, source: str, seed: int | None, left_out: Sequence[str] = ()) -> None:
        """left_out: columns that the rows lack, since they hold bytes."""
        if len(rows) == 0:
            raise _empty(source)
        self.left_out = left_out
        self.num_rows: int = len(rows)
        self._rows = rows
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def epoch_of(self, cursor: int) -> int:
        return cursor // self.num_rows

    def row_at(self, cursor: int) -> tuple[Row, str]:
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

    def __init__(
        self,
        rows: Iterable[Row | ConfigError],
        *,
        source: str,
        seed: int | None,
        window: int,
        left_out: Sequence[str] = (),
    ) -> None:
        """left_out: as of a table. A row that is an error is raised where it is asked for."""
        self.left_out = left_out
        self._rows = rows
        self._source = source
        self._seed = seed
        self._window = window
        self._iterator: Iterator[Row | ConfigError] = iter(())
        self._epoch = -1
        self._position = 0
        self._length: int | None = None
        self._has_read = False

    def epoch_of(self, cursor: int) -> int:
        return 0 if self._length is None else cursor // self._length

    def row_at(self, cursor: int) -> tuple[Row, str]:
        """Return the row, and its location in words. Raises what the reader raises; the stream then starts again."""
        while True:
            epoch = self.epoch_of(cursor)
            index = cursor - epoch * (self._length or 0)
            if epoch != self._epoch or index < self._position:
                self._start(epoch)
            row = self._read_up_to(index)
            if isinstance(row, ConfigError):
                raise row
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

    def _read_up_to(self, index: int) -> Row | ConfigError | None:
        """Return row `index` of the current epoch, or None where it ends before."""
        try:
            for row in self._iterator:
                self._has_read = True
                self._position += 1
                if self._position > index:
                    return row
        except Exception as error:
            self._epoch = -1  # a broken iterator looks like one at its end
            if self._has_read or isinstance(error, ConfigError):
                raise
            raise _unreadable(self._source, error) from None
        return None


def _window_shuffle(
    rows: Iterator[Row | ConfigError], *, window: int, rng: np.random.Generator
) -> Iterator[Row | ConfigError]:
    """Yield, for each row read, a random one of the window; what is left at the end comes in random order."""
    held: list[Row | ConfigError] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
        else:
            i = int(rng.integers(window))
            yield held[i]
            held[i] = row
    for i in rng.permutation(len(held)):
        yield held[i]


def _load(config: PromptConfig, source: str) -> Any:
    """Return what yields rows: with `len` and an index, or a stream's iterable. Raises ConfigError."""
    local = expanded(config.path)
    if local.exists() and config.revision is not None:
        _log.warning("%s: revision has no effect, it is on this machine", source)
    try:
        rows = _from_files(config, _local_files(config, local, source), source)
        return _from_repository(config, source) if rows is None else rows
    except ConfigError:
        raise
    except Exception as error:  # its readers raise many kinds; each means that what the config names cannot be read
        raise _unreadable(source, error) from None


def _local_files(config: PromptConfig, local: Path, source: str) -> dict[str, list[str]]:
    """Return the files of each split by their exact paths; none of a hub id, or where a card describes the folder."""
    if local.is_file():
        if _builder_of(local.name) is None:
            known = ", ".join(_BUILDERS)
            raise ConfigError(f"{source} is a file of unknown kind: use one of {known}, a folder of them, or a hub id")
        return {"train": [str(local)]}
    if local.is_dir() and not (local / "README.md").is_file():
        folder = local / config.name if config.name and (local / config.name).is_dir() else local
        base = glob.escape(str(folder.resolve()))
        return dict(DataFilesDict.from_patterns(get_data_patterns(base), base_path=base))
    if local.exists() and not local.is_dir():
        raise ConfigError(f"{source} is neither a file nor a folder: copy what it gives into a file")
    if not local.exists() and (local.suffix in _BUILDERS or not HUB_ID.fullmatch(config.path)):
        raise ConfigError(
            f"{source}: no such file or folder (relative paths start at {Path.cwd()}), nor is it a hub id{near_path(config.path)}"
        )
    if not local.exists() and (problem := hub_problem(config.path, kind="dataset", revision=config.revision)):
        raise ConfigError(f"{source}: {problem}")
    return {}


def _builder_of(name: str) -> str | None:
    return next((_BUILDERS[suffix] for suffix in reversed(Path(name).suffixes) if suffix in _BUILDERS), None)


def _from_files(config: PromptConfig, splits: dict[str, list[str]], source: str) -> Any:
    """Load the files of the kind that most of them have; None where none is of a known kind."""
    kinds = Counter(kind for files in splits.values() for file in files if (kind := _builder_of(file)))
    if not kinds:
        return None
    # of as many, those with types: what lies beside them describes them
    kind, *others = sorted(kinds, key=lambda kind: (kinds[kind], kind not in _TEXT), reverse=True)
    if others:
        _log.warning("%s: its %s files are read, those of %s are left out", source, kind, ", ".join(others))
    splits = {split: [file for file in files if _builder_of(file) == kind] for split, files in splits.items()}
    if kind in _TEXT:
        return _text_rows(config, splits, source, kind=kind)
    escaped = {split: [glob.escape(file) for file in files] for split, files in splits.items() if files}
    return datasets.load_dataset(kind, data_files=escaped, split=config.split, streaming=config.streaming)


def _from_repository(config: PromptConfig, source: str) -> Any:
    """Load from the hub, or from a folder with a card, which say what are the files of a split."""
    local = expanded(config.path)
    where = {"path": str(local) if local.exists() else config.path, "name": config.name}
    if not local.exists():
        where["revision"] = config.revision
    builder = datasets.load_dataset_builder(**where)
    kind = "json" if isinstance(builder, Json) else "csv" if isinstance(builder, Csv) else ""
    if kind:
        splits = {str(split): list(files) for split, files in builder.config.data_files.items()}
        return _text_rows(config, splits, source, kind=kind, separator=getattr(builder.config, "sep", ","))
    return datasets.load_dataset(**where, split=config.split, streaming=config.streaming)


def _text_rows(
    config: PromptConfig, splits: dict[str, list[str]], source: str, *, kind: str, separator: str = ","
) -> TextTable | TextStream:
    def opened(file: str) -> TextFile:
        separator_of = "\t" if ".tsv" in Path(file).suffixes else separator
        if Path(file).suffix not in _BUILDERS or ("://" in file and not config.streaming):  # compressed, or on the hub
            file = datasets.DownloadManager().download_and_extract(file)
        return TextFile(file, source=source, delimiter=separator_of if kind == "csv" else None)

    if config.streaming and config.split not in splits:
        raise ConfigError(f"{source}: Bad split {config.split!r}: a stream's split is one of {', '.join(splits)}")
    wanted = [config.split] if config.split in splits else list(splits)
    files = {split: [opened(file) for file in splits[split]] for split in wanted}
    return TextStream(files[config.split]) if config.streaming else TextTable(files, config.split)


def _empty(source: str) -> ConfigError:
    return ConfigError(f"{source} has no rows: check the file, or name another split")


def _unreadable(source: str, error: Exception) -> ConfigError:
    reason = short_reason(error)
    if isinstance(error, StopIteration) or any(sign in reason for sign in _NO_ROWS):
        return _empty(source)
    known = (advice for sign, advice in _ADVICE.items() if sign in reason)
    hint = cache_problem() or next(known, "check path, name, revision and split")
    return ConfigError(f"{source} cannot be read: {reason} ({hint})")


def short_reason(error: BaseException) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
