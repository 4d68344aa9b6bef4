"""Rows of JSON and CSV files, as the file has them: no type is inferred, and no row depends on another.

JSON is what Python's `json` reads: one object per line, or one array of objects. A cell of CSV is its text, and None where
it is empty. A row that cannot be read is a ConfigError in its place, which names file and line.
"""

from __future__ import annotations

import array
import csv
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import xxhash
from datasets import ReadInstruction
from numpy.typing import NDArray

from sluice.common.errors import ConfigError

Row = dict[str, Any]
Located = tuple[int, bytes, Row | ConfigError]
"""Where a row begins, its bytes, and the row; of an element of a JSON array its index, and no bytes."""

_BOM = b"\xef\xbb\xbf"
_KINDS = {list: "an array", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
csv.field_size_limit(sys.maxsize)  # the default refuses a cell over 128 kB


class TextFile:
    """The rows of one file in order; and any of them again, by where it was found."""

    def __init__(self, url: str, *, source: str, delimiter: str | None = None) -> None:
        """`source` begins the errors. delimiter: of CSV; none = JSON."""
        self._url, self._delimiter = url, delimiter
        self._where = f"{source}, {Path(url).name}"
        self._header: list[str] = []
        self._array: list[Any] | None = None

    def __iter__(self) -> Iterator[Located]:
        """Yield every row. Raises ConfigError where the file as a whole cannot be read."""
        is_local = "://" not in self._url
        with open(self._url, "rb") if is_local else fsspec.open(self._url, "rb") as file:
            yield from self._objects(file) if self._delimiter is None else self._records(file)

    def row(self, start: int, length: int, digest: int) -> Row:
        """Return a row that `__iter__` has yielded. Raises ConfigError where its bytes have changed since."""
        if self._array is not None:
            return dict(self._array[start])
        with open(self._url, "rb") as file:
            file.seek(start)
            raw = file.read(length)
        if digest_of(raw) != digest:
            raise ConfigError(
                f"{self._where} was changed there after this process read it: start the run's roles again"
            )
        if self._delimiter is None:
            return dict(json.loads(raw.decode()))
        return self._by_column(next(csv.reader([raw.decode()], delimiter=self._delimiter, strict=True)))

    def _objects(self, file: IO[bytes]) -> Iterator[Located]:
        end, is_first = 0, True
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if start == 0 and line.startswith(_BOM):
                start, line = len(_BOM), line.removeprefix(_BOM)
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith(b"["):
                yield from self._elements(line + file.read(), number)
                return
            is_first = False
            try:
                row: Row | ConfigError = self._object(self._parsed(line.rstrip(), number), f"line {number}")
            except ConfigError as error:
                row = error
            yield start, line, row

    def _elements(self, raw: bytes, first_line: int) -> Iterator[Located]:
        self._array = self._parsed(raw, first_line)
        for i, element in enumerate(self._array or ()):
            try:
                yield i, b"", self._object(element, f"element {i}")
            except ConfigError as error:
                yield i, b"", error

    def _parsed(self, raw: bytes, first_line: int) -> Any:
        place = f"line {first_line}"
        text = self._decoded(raw, place)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {first_line + error.lineno - 1}, column {error.colno}"
            reason = f"not JSON: {error.msg}; write one object per line, or one array of objects"
        except ValueError:
            reason = "an integer has more than 4300 digits; write it as text"
        except RecursionError:
            reason = "nested too deep; write fewer levels"
        raise ConfigError(f"{self._where}, {place}: {reason}")

    def _object(self, value: Any, place: str) -> Row:
        if isinstance(value, dict):
            return value
        raise ConfigError(
            f"{self._where}, {place}: a row is an object with a key per column, this is {_KINDS[type(value)]}"
        )

    def _decoded(self, raw: bytes, place: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._where}, {place}: not UTF-8 ({error.reason}): save the file as UTF-8") from None

    def _records(self, file: IO[bytes]) -> Iterator[Located]:
        end = 0
        lines: list[bytes] = []
        "of the record that is being read"

        def decoded() -> Iterator[str]:
            for line in file:
                lines.append(line)
                text = line.removeprefix(_BOM) if end == 0 else line
                yield text.decode(errors="surrogateescape")  # an error here would end the generator: `_cells` finds it

        reader = csv.reader(decoded(), delimiter=self._delimiter or ",", strict=True)
        self._header = []
        while True:
            lines.clear()
            try:
                row: list[str] | ConfigError = self._cells(reader)
            except StopIteration:
                return
            except ConfigError as error:
                row = error
            start, raw = end, b"".join(lines)
            end += len(raw)
            if isinstance(row, list) and row and not self._header:
                self._header = row
            elif isinstance(row, ConfigError) and not self._header:
                raise row
            elif row:
                yield start, raw, row if isinstance(row, ConfigError) else self._by_column(row)

    def _cells(self, reader: Any) -> list[str]:
        """Return the cells of the next record; none of an empty line. Raises ConfigError, StopIteration."""
        place = f"line {reader.line_num + 1}"
        try:
            cells: list[str] = next(reader)
        except csv.Error as error:
            raise ConfigError(
                f"{self._where}, {place}: not CSV: {error}; end lines with LF or CRLF, put a cell with quotes in quotes, and "
                "double those"
            ) from None
        self._decoded("".join(cells).encode(errors="surrogateescape"), place)
        if self._header and len(cells) > len(self._header):
            raise ConfigError(
                f"{self._where}, {place}: {len(cells)} cells under {len(self._header)} columns: quote cells with a comma"
            )
        if not self._header and len(set(cells)) < len(cells):
            raise ConfigError(
                f"{self._where}, {place}: two columns have the same name, of {', '.join(cells)}: rename one"
            )
        return cells

    def _by_column(self, cells: list[str]) -> Row:
        """Return a row; the columns for which a line is too short are empty as well."""
        return dict(itertools.zip_longest(self._header, (cell or None for cell in cells)))


def digest_of(raw: bytes) -> int:
    return xxhash.xxh3_64_intdigest(raw) >> 1  # what a signed integer holds


class TextTable:
    """The rows of a split, by number. A column that any of them has is None in those that lack it."""

    def __init__(self, splits: Mapping[str, Sequence[TextFile]], split: str) -> None:
        """Read the files once. split: a name, or a slice as in datasets. Raises ConfigError for the first bad row."""
        self._files: list[TextFile] = []
        self._columns: Row = {}
        found = {name: self._scan(splits[name]) for name in ([split] if split in splits else splits)}
        pieces = ReadInstruction.from_spec(split).to_absolute({name: len(spans) for name, spans in found.items()})
        self._spans = np.concatenate([found[piece.splitname][piece.from_ : piece.to] for piece in pieces])
        "[rows, 4]: number of the file, start, length, digest"

    def _scan(self, files: Sequence[TextFile]) -> NDArray[np.int64]:
        spans = array.array("q")
        for file in files:
            for start, raw, row in file:
                if isinstance(row, ConfigError):
                    raise row
                self._columns |= dict.fromkeys(row)
                spans.extend((len(self._files), start, len(raw), digest_of(raw)))
            self._files.append(file)
        return np.frombuffer(spans, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Row:
        number, *place = self._spans[index].tolist()
        return self._columns | self._files[number].row(*place)


class TextStream:
    """The rows of some files, in order. A column that the first row has is None in those that lack it."""

    def __init__(self, files: Sequence[TextFile]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[Row | ConfigError]:
        columns: Row | None = None
        for file in self._files:
            for _, _, row in file:
                if isinstance(row, ConfigError):
                    yield row
                    continue
                columns = dict.fromkeys(row) if columns is None else columns
                yield columns | row
