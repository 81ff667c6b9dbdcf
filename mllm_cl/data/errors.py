"""What is raised where data are wrong, and where in which file."""

from collections.abc import Sequence


class DataError(ValueError):
    """Something in a data set cannot be used; `file` and `row`, counted from 1, say where.

    Both are empty where the error is about no single row or file.
    """

    def __init__(self, problem: str, file: str = "", row: int | None = None):
        super().__init__(problem, file, row)  # all of it, so that it survives a worker process
        self.problem, self.file, self.row = problem, file, row

    def __str__(self) -> str:
        row = "" if self.row is None else f"row {self.row}"
        place = ", ".join(part for part in (self.file, row) if part)
        return f"{place}: {self.problem}" if place else self.problem

    def at(self, file: str, row: int | None) -> "DataError":
        """The same problem at a place, unless it has one already."""
        return self if self.file else DataError(self.problem, file, row)


def some(names: Sequence[str], number: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - number
    return ", ".join(names[:number]) + (f" and {more} more" if more > 0 else "")


def shortened(value: object, width: int = 60) -> str:
    """The value as text on one line that fits into a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
