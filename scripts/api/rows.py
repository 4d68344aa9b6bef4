"""A dataset that a program holds, as a file that the dataset workers of a run read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any
from uuid import UUID

from sluice.common.errors import ConfigError

_AS_TEXT = (date, time, Decimal, UUID, PathLike)
"""What becomes text, as in a dataset that is read from Parquet."""


@dataclass(frozen=True, kw_only=True)
class GivenRows:
    """Rows that are to be written."""

    file: str
    columns: frozenset[str]
    write: Callable[[Path], object]


def given_rows(dataset: object) -> GivenRows | str:
    """Return rows to write, or the path or hub id that was given. Raises ConfigError for what is neither."""
    if isinstance(dataset, (str, PathLike)):
        return str(dataset)
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # loaded, if the object is one of theirs
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        return _table(dataset, lambda path: dataset.to_parquet(path, index=False), list(dataset.columns))
    if datasets is not None and isinstance(dataset, datasets.Dataset):
        return _table(dataset, lambda path: _write_quietly(datasets, dataset, path), dataset.column_names)
    if datasets is not None and isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ConfigError(
            f"dataset holds the splits {', '.join(dataset)}: give one of them, dataset[{next(iter(dataset))!r}]"
        )
    if isinstance(dataset, Sequence) and not isinstance(dataset, (bytes, bytearray)):
        text, columns = _lines(dataset)
        return GivenRows(file="rows.jsonl", columns=frozenset(columns), write=lambda path: path.write_text(text))
    raise ConfigError(
        f"dataset is of type {type(dataset).__name__}: give a list of rows, a datasets.Dataset, a pandas DataFrame, or the path "
        "of a file or its hub id (with dataset__streaming=True for a set that is read as a stream)"
    )


def _table(rows: Any, write: Callable[[Path], object], columns: Sequence[Any]) -> GivenRows:
    if not len(rows):
        raise ConfigError("dataset has no rows")

    def written(path: Path) -> None:
        try:
            write(path)
        except (ValueError, TypeError, OverflowError) as error:  # among them pyarrow's
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"dataset cannot be written as Parquet: {reason}; give it as a list of rows") from None

    return GivenRows(file="rows.parquet", columns=frozenset(map(str, columns)), write=written)


def _write_quietly(datasets: Any, rows: Any, path: Path) -> None:
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.to_parquet(path)
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


def _lines(rows: Sequence[Any]) -> tuple[str, dict[str, None]]:
    """Return rows as lines of JSON, and their columns. Raises ConfigError, which names the row."""
    if not rows:
        raise ConfigError("dataset has no rows")
    lines: list[str] = []
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(
                f"dataset[{number}] is of type {type(row).__name__}: a row is a dict with a value for each column, such as "
                "{'prompt': 'What is 2+2?', 'target': '4'}"
            )
        for column, value in row.items():
            columns[str(column)] = None
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"dataset[{number}][{column!r}]: {error}; give text, numbers, lists and dicts"
                ) from None
        lines.append(json.dumps({str(column): value for column, value in row.items()}, default=_plain) + "\n")
    return "".join(lines), columns


def _plain(value: Any) -> Any:
    """Return a value of another type in the types of JSON. Raises TypeError."""
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of numpy, of torch
        return value.tolist()
    raise TypeError(f"an object of type {type(value).__name__} has no form in JSON")
