"""The score matrix as a picture."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_cl.metrics.scores import matrix
from mllm_cl.report.runs import scored
from mllm_cl.report.terminal import line

MOST_NUMBERS = 450  # in one table: of more, nobody reads them, and drawing them takes long


def draw(scores: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a heat map of the matrix (content of `scores.json`); the file's ending is its format.

    Rows are stages and columns tasks; retained data stands apart on the right, and a frame marks
    the task that a row has just learnt.
    """
    tasks, retain, rows = list(scores["tasks"]), list(scores["retain"]), scored(scores)
    width = 2.4 + 0.78 * (len(tasks) + len(retain)) + (0.3 if retain else 0)
    figure = blank(max(width, 6.8), 1.9 + 0.46 * len(rows))
    ratios = [len(tasks), *([len(retain)] if retain else [])]
    panes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    after = [row["after"] for row in rows]
    image = heat(panes[0], matrix(rows, tasks), tasks, after, "tasks, in the order of learning")
    if retain:
        heat(panes[1], matrix(rows, retain), retain, [""] * len(rows), "retained")
    panes[0].set_ylabel("after learning")
    figure.colorbar(image, ax=panes.tolist(), label="score", fraction=0.05, pad=0.02)
    figure.suptitle(line(scores["summary"]), fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def blank(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches that needs no display."""
    # imported here, and without pyplot: a server has no display, most commands draw nothing
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat(
    axes: Any,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    *,
    top: float = 1.0,
    colours: str = "viridis",
) -> Any:
    """A table of numbers from 0 to `top` as coloured cells, with the numbers if they are few.

    `axes` are matplotlib's; returns the image, for a colour bar.
    """
    image = axes.imshow(values, vmin=0, vmax=top, cmap=colours, aspect="auto")
    axes.set_title(title, fontsize=9, color="0.35")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks([j + 0.5 for j in range(len(columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.set_facecolor("0.94")
    axes.spines[:].set_visible(False)
    if len(rows) * len(columns) > MOST_NUMBERS:
        return image
    for i, name in enumerate(rows):
        for j, value in enumerate(values[i]):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
            if columns[j] == name:
                axes.add_patch(_frame(i, j))
    return image


def _frame(row: int, column: int):
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="#e8590c", linewidth=2
    )
