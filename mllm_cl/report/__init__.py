"""What is shown of runs: their matrices on the terminal, one HTML page, and pictures."""

from collections.abc import Sequence
from pathlib import Path

from mllm_cl.report.figure import draw
from mllm_cl.report.page import page
from mllm_cl.report.pictures import pictures
from mllm_cl.report.runs import Group, find, group, load, load_scores
from mllm_cl.report.terminal import compare, show

__all__ = ["compare", "draw", "load_scores", "read", "show", "write"]


def read(folders: Sequence[str | Path]) -> list[Group]:
    """The runs in `folders` (runs, or folders of runs such as a sweep's), replicates together.

    Raises ValueError, naming the folder or file, where there is no run or one is damaged.
    """
    return group([load(folder) for folder in find(folders)])


def write(groups: Sequence[Group], folder: str | Path) -> Path:
    """Write the page `report.html` and the pictures into `folder`; returns the page's path."""
    folder = Path(folder)
    pictures(groups, folder)
    path = folder / "report.html"
    path.write_text(page(groups), encoding="utf-8")
    return path
