"""Rows that are one picture of one class: which columns say so, and what the classes are."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.source.arrow import ArrowRows
from mllm_cl.data.source.folders import FolderRows
from mllm_cl.data.source.formats import Format
from mllm_cl.data.source.images import open_picture
from mllm_cl.data.source.rows import JoinedRows, Rows, column
from mllm_cl.data.source.split import columns_of

# Names of columns in the order in which they are taken, where no column says that it has classes.
LABELS = ("class_name", "label", "labels", "class", "fine_label", "category", "species", "target")


@dataclass(frozen=True, eq=False)
class RowPictures:
    """The one picture of each row."""

    rows: Rows
    format: Format
    root: Path
    split: str

    def id(self, index: int) -> str:
        file, row = self.rows.place(index)
        if row is None:
            return os.path.relpath(file, self.root.parent)
        return f"{self.split}/{Path(file).stem}-{row}"  # splits may have files of one name

    def place(self, index: int) -> tuple[str, int | None]:
        return self.rows.place(index)

    def sample(self, index: int) -> dict[str, object]:
        try:
            images = self.format.pictures_of(self.rows[index])
            if len(images) != 1:
                raise DataError(f"has {len(images)} pictures, expected one of a class")
            return {"id": self.id(index), "images": [open_picture(images[0], self.root)]}
        except DataError as error:
            raise error.at(*self.place(index)) from error.__cause__


def labelled_format(rows: Rows, label: str | None, image: str | None, file: str) -> Format:
    """How the rows are read: a class is an answer to one question for all.

    DataError with the columns that were found where those of class and picture cannot be told.
    """
    columns = tuple(columns_of(rows))
    answer = _label_column(rows, columns, label, file)
    form = Format("classes", columns, prompt="?", answer=answer, image=image)
    check_image(form, file)
    return form


def classes_of(rows: Rows, label: str) -> tuple[list[str], tuple[str, ...]]:
    """The class of every row, and all classes: as the data list them, or else by name.

    A row without one is a DataError naming it.
    """
    values = [_class_name(rows, index, one) for index, one in enumerate(column(rows, label))]
    names = _declared(rows, label) or tuple(sorted(sorted(set(values)), key=by_name(values)))
    known = set(names)
    unknown = next((index for index, value in enumerate(values) if value not in known), None)
    if unknown is not None:
        problem = f"{label!r} is {values[unknown]}, none of the {len(names)} classes of the data"
        raise DataError(problem, *rows.place(unknown))
    return values, names


def by_name(names: Iterable[str]) -> Callable[[str], object]:
    """How classes are ordered by name: numbers as numbers."""
    return int if all(name.isdecimal() for name in names) else str


def _label_column(rows: Rows, columns: Sequence[str], given: str | None, file: str) -> str:
    """The column of classes: the one given, of the type for classes, or of the usual name."""
    found = f"found the columns {', '.join(columns)}"
    if given is not None:
        if given not in columns:
            raise DataError(f"args.label names {given!r}; {found}", file)
        return given
    typed = [name for name in columns if _declared(rows, name)]
    if len(typed) == 1:
        return typed[0]
    name = next((name for name in LABELS if name in (typed or columns)), None)
    if name is None:
        what = "several that have classes" if typed else "none that has the classes by its name"
        raise DataError(f"{found}, {what}; write args: {{label: COLUMN}}", file)
    return name


def check_image(form: Format, file: str) -> None:
    """DataError with the columns that were found where none is that of the picture."""
    if form.image is not None and form.image not in form.columns:
        found = ", ".join(form.columns)
        raise DataError(f"args.image names {form.image!r}, but the columns are {found}", file)
    if not form.pictures():
        found = ", ".join(form.columns)
        problem = f"found the columns {found}, and none that is the picture by its name"
        raise DataError(f"{problem}; write args: {{image: COLUMN}}", file)


def _declared(rows: Rows, name: str) -> tuple[str, ...]:
    """The classes that the data list for a column, in their order; empty if they list none."""
    if isinstance(rows, JoinedRows):
        listed = (each for part in rows.parts for each in _declared(part, name))
        return tuple(dict.fromkeys(listed))
    if isinstance(rows, FolderRows):
        return rows.names if name == "label" else ()
    return tuple(rows.names.get(name, ())) if isinstance(rows, ArrowRows) else ()


def _class_name(rows: Rows, index: int, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # Bytes that are no text are read as lone surrogates, which no file takes again.
    if isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value):
        return value
    problem = f"the class is {shortened(value)}, expected a name or a whole number"
    raise DataError(problem, *rows.place(index))
