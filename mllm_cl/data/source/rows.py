"""Rows of JSON, JSON Lines, CSV and Parquet files as dicts, read when they are asked for.

A file that is none at all is a DataError here; a broken line is one when its row is asked for.
"""

import csv
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.source.arrow import ArrowRows, Row, parquet_rows

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class Rows(Protocol):
    """What every reader gives: rows by index, and where in which file a row stands (from 1)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def place(self, index: int) -> tuple[str, int]: ...


def read_rows(path: Path) -> Rows:
    """The rows of one file, by its suffix; DataError for a file that is not what it says."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise DataError(f"expected a file of rows ({known}); unpack an archive first", str(path))
    read = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": parquet_rows}.get(suffix, _json_rows)
    try:
        rows = read(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from None
    if not len(rows):
        raise DataError("holds no rows", str(path))
    return rows


def column(rows: Rows, name: str) -> Iterator[object]:
    """What all rows have in a column, None where a row has no such; no pictures are read.

    A row that cannot be read is a DataError naming it.
    """
    if isinstance(rows, JoinedRows):
        return chain.from_iterable(column(part, name) for part in rows.parts)
    if isinstance(rows, ArrowRows) and name in rows.dataset.column_names:
        return iter(rows.column(name))
    return (_cell(rows, index, name) for index in range(len(rows)))


def _cell(rows: Rows, index: int, name: str) -> object:
    try:
        return rows[index].get(name)
    except DataError as error:
        raise error.at(*rows.place(index)) from error.__cause__


class ListedRows:
    """Rows that are in memory, with their places in the file they came from."""

    def __init__(self, file: str, entries: Sequence[Any], numbers: Sequence[int] | None = None):
        self.file, self.entries = file, entries
        self.numbers = range(1, len(entries) + 1) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Row:
        return _object(self.entries[index])

    def place(self, index: int) -> tuple[str, int]:
        return self.file, self.numbers[index]


class LineRows:
    """The lines of a JSON Lines file, parsed one by one; in memory is only where they begin."""

    def __init__(self, path: Path):
        self.path, self.starts, self.numbers = path, array("Q"), array("Q")
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    self.starts.append(place)
                    self.numbers.append(number)
                place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        return _object(_parsed(line))

    def place(self, index: int) -> tuple[str, int]:
        return str(self.path), self.numbers[index]


class JoinedRows:
    """The rows of several files, one after another."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts, self.ends = parts, list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        part, index = self._find(index)
        return part[index]

    def place(self, index: int) -> tuple[str, int]:
        part, index = self._find(index)
        return part.place(index)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)


def _json_rows(path: Path) -> Rows:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"["):
        if head.split(b"\n")[0].strip() == b"{":
            raise DataError("is one JSON object, expected a list or one row per line", str(path))
        return LineRows(path)
    entries = _parsed(path.read_bytes(), str(path))
    return ListedRows(str(path), entries)


def _parsed(text: bytes, file: str = "") -> Any:
    """JSON; bytes that are no UTF-8 stay in it as lone surrogates, to be found in their row."""
    try:
        return json.loads(text.decode("utf-8-sig", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if file else ""
        raise DataError(f"is not JSON: {error.msg} ({where}column {error.colno})", file) from None
    except RecursionError:
        raise DataError("is not JSON that can be read: nested too deeply", file) from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"is not JSON that can be read: {error}", file) from None


def _csv_rows(path: Path) -> Rows:
    entries, numbers = [], []
    try:
        for number, entry in _csv_entries(path):
            entries.append(entry)
            numbers.append(number)
    except csv.Error as error:
        raise DataError(f"is no table that can be read: {error}", str(path)) from None
    return ListedRows(str(path), entries, numbers)


def _csv_entries(path: Path) -> Iterator[tuple[int, Row | DataError]]:
    """Line number and row; a row that does not fit its header is its own error."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, line = next(reader, []), reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                yield line, DataError(f"has {len(cells)} cells, its header {len(header)}")
            elif cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1


def _object(entry: Any) -> Row:
    if isinstance(entry, DataError):
        raise entry
    if not isinstance(entry, dict):
        raise DataError(f"found {shortened(entry)}, expected a row with names and values")
    return entry
