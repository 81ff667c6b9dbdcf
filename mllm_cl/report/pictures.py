"""The pictures of a report as PNG files, for papers and slides."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_cl.report import grids, series, stages
from mllm_cl.report.figure import blank, heat
from mllm_cl.report.grids import DRIFTS, ROUTING, Grid
from mllm_cl.report.interval import interval
from mllm_cl.report.runs import Group
from mllm_cl.report.series import Panel
from mllm_cl.report.stages import Plane
from mllm_cl.report.words import numbers

# Okabe and Ito's colours, which all common kinds of colour vision tell apart, less the yellow that
# is too pale on white. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def pictures(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Write a picture of everything that there is data for, and return the files.

    With several groups those that show one have its label in their name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Grid]] = {}
    lines = {"drift": series.drifts(groups)}
    for group in groups:
        end = f"_{_plain(group.label)}" if len(groups) > 1 else ""
        found[f"scores{end}"] = [
            grids.scores(group, group.tasks, "tasks, in the order of learning"),
            grids.scores(group, group.retain, "known before"),
        ]
        found[f"drift_by_layer{end}"] = [grids.by_layer(group, *one) for one in DRIFTS.items()]
        found[f"routing{end}"] = [grids.by_task(group, *one) for one in ROUTING.items()]
        found[f"covariance{end}"] = [grids.covariance(group, "inputs of t in directions of s")]
        lines[f"scores_over_time{end}"] = series.over_time(group)
    drawn = {name: _draw_lines(panels) for name, panels in lines.items()}
    for name, tables in found.items():
        drawn[name] = _draw_tables(tables, of_drift=name.startswith("drift"))
    drawn["stages"] = _draw_planes(stages.planes(groups))
    if len(groups) > 1:
        drawn["methods"] = _draw_methods(groups)
    files = {folder / f"{name}.png": figure for name, figure in drawn.items() if figure}
    for path, figure in files.items():
        figure.savefig(path)
    return sorted(files)


def _plain(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label).strip("_")


def _draw_tables(tables: Sequence[Grid], *, of_drift: bool) -> Any:
    """A figure of tables side by side, None without data."""
    tables = [grid for grid in tables if not grid.empty]
    if not tables:
        return None
    widths = [len(grid.columns) + 1.5 for grid in tables]
    height = max(len(grid.rows) for grid in tables)
    figure = blank(1.0 + 0.66 * sum(widths), 1.5 + 0.36 * height)
    panes = figure.subplots(1, len(tables), width_ratios=widths, squeeze=False)[0]
    top = max(grid.top for grid in tables) if of_drift else 1.0
    colours = "Oranges" if of_drift else "viridis"
    for axes, grid in zip(panes, tables, strict=True):
        heat(axes, grid.values, grid.columns, grid.rows, grid.title, top=top, colours=colours)
    return figure


def _draw_lines(panels: Sequence[Panel]) -> Any:
    """A figure of panels side by side, None without data."""
    if not panels:
        return None
    figure = blank(4.6 * len(panels), 3.4)
    panes = figure.subplots(1, len(panels), squeeze=False)[0]
    labels = [[one.label for one in panel.series] for panel in panels]
    for i, (axes, panel) in enumerate(zip(panes, panels, strict=True)):
        _lines(axes, panel)
        if labels[i] not in labels[i + 1 :]:  # the same lines are named once, at the right
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _lines(axes: Any, panel: Panel) -> None:
    for i, one in enumerate(panel.series):
        colour, dash = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
        start = panel.names.index(one.start) if one.start in panel.names else 0
        ys = [one.values.get(name, math.nan) for name in panel.names]
        halves = [one.halves.get(name, math.nan) for name in panel.names]
        xs = range(len(ys))
        before = [(x, y) for x, y in zip(xs, ys, strict=True) if x <= start and not math.isnan(y)]
        if before:  # without points matplotlib would take ":" for a value
            axes.plot(*zip(*before, strict=True), ":", color=colour, linewidth=0.9)
        axes.plot(xs[start:], ys[start:], "o" + dash, color=colour, markersize=3, label=one.label)
        band = [(y - half, y + half) for y, half in zip(ys, halves, strict=True)][start:]
        axes.fill_between(xs[start:], *zip(*band, strict=True), color=colour, alpha=0.15, lw=0)
    axes.set_xticks(range(len(panel.names)), panel.names, rotation=30, ha="right")
    axes.set_ylim(0, panel.top * 1.03)
    _plain_axes(axes, panel.title)


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, color="0.35")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.tick_params(labelsize=8)


def _draw_planes(planes: Sequence[Plane]) -> Any:
    """A figure of curves over scales, three side by side, None without data."""
    if not planes:
        return None
    columns, rows = min(3, len(planes)), -(-len(planes) // 3)
    figure = blank(5.4 * columns, 3.6 * rows)
    panes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panes[len(planes) :]:
        axes.set_axis_off()
    for axes, plane in zip(panes, planes, strict=False):
        _curves(axes, plane)
        axes.set_xticks(*zip(*plane.ticks, strict=True))
        axes.set_ylim(0, 1.03)
        _plain_axes(axes, plane.title)
        if not plane.in_place:
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curves(axes: Any, plane: Plane) -> None:
    beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    for one in plane.curves:
        colour = COLOURS[one.number % len(COLOURS)]
        dash = "-" if one.number < len(COLOURS) else "--"
        xs, ys = [point.x for point in one.points], [point.y.mean for point in one.points]
        axes.plot(xs, ys, "o" + dash, color=colour, markersize=3, label=one.label)
        band = [(point.y.mean - point.y.half, point.y.mean + point.y.half) for point in one.points]
        axes.fill_between(xs, *zip(*band, strict=True), color=colour, alpha=0.15, lw=0)
        if plane.in_place:
            axes.annotate(one.label, (xs[-1], ys[-1]), color=colour, **beside)


def _draw_methods(groups: Sequence[Group]) -> Any:
    """A figure of the means over seeds with their intervals, a row per group; None without data."""
    titles = numbers(groups)
    known = {key: title for key, title in titles.items() if any(g.summary(key) for g in groups)}
    if not known:
        return None
    figure = blank(1.8 + 2.4 * len(known), 1.0 + 0.42 * len(groups))
    panes = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panes, known.items(), strict=True):
        for row, group in enumerate(groups):
            found = interval(group.summary(key))
            if found is not None:
                half = 0 if math.isnan(found.half) else found.half
                axes.errorbar(found.mean, row, xerr=half, fmt="o", color=COLOURS[0], capsize=3)
                axes.plot(found.values, [row] * len(found.values), "|", color="0.5", markersize=7)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_title(title, fontsize=9, color="0.35")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
    panes[0].set_yticks(range(len(groups)), [group.label for group in groups])
    return figure
