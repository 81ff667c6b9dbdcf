"""Rows that lie in Arrow: Parquet files and data sets of the hub, through `datasets`."""

from pathlib import Path
from typing import Any

from mllm_cl.data.errors import DataError

Row = dict[str, Any]


class ArrowRows:
    """The rows of a `datasets.Dataset`, undecoded: pictures stay bytes, classes become names."""

    def __init__(self, dataset, file: str):
        features = dataset.features
        self.dataset, self.file = dataset.with_format("arrow"), file
        self.names = {name: list(each.names) for name, each in features.items() if _labels(each)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        row = self.dataset[index].to_pylist()[0]
        return named_classes(row, self.names)

    def place(self, index: int) -> tuple[str, int]:
        return self.file, index + 1

    def column(self, name: str) -> list[object]:
        """One column of all rows; the others, and with them the pictures, stay on the disk."""
        table = self.dataset.select_columns([name])[:]
        rows = ({name: value} for value in table.column(name).to_pylist())
        return [named_classes(row, self.names)[name] for row in rows]


def parquet_rows(path: Path) -> ArrowRows:
    """A Parquet file through `datasets`, which keeps it on the disk and out of memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        number = parquet.ParquetFile(path).metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"is no Parquet that can be read: {error}", str(path)) from None
    if not number:
        raise DataError("holds no rows", str(path))
    return ArrowRows(load("parquet", data_files=str(path), split="train"), str(path))


def load(path: str, **options: object):
    """`datasets.load_dataset`, whose many errors become a DataError; no bar in a log file."""
    import sys

    import datasets
    import pyarrow

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    errors = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError)
    try:
        return datasets.load_dataset(path, **options)
    except errors as error:
        file = str(options.get("data_files", path))
        reason = " ".join(f"{error.__cause__ or error}".split())
        raise DataError(f"cannot be read as a data set: {reason}", file) from error


def named_classes(row: Row, names: dict[str, list[str]]) -> Row:
    """The row with the names of its classes in place of their numbers."""
    for column, classes in names.items():
        if isinstance(row.get(column), int) and 0 <= row[column] < len(classes):
            row[column] = classes[row[column]]
    return row


def _labels(feature: object) -> bool:
    from datasets import ClassLabel

    return isinstance(feature, ClassLabel)
