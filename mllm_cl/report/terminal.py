"""The score matrix on a terminal: coloured for people, plain for log files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mllm_cl.metrics.scores import CONSTANT, matrix
from mllm_cl.report.interval import Interval, interval
from mllm_cl.report.runs import Group, scored
from mllm_cl.report.words import main_number, numbers

# seven steps of the colour map viridis, dark (0) to bright (1), and a readable text colour on each
HEAT = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")
INK = ("white", "white", "white", "white", "black", "black", "black")
SHOWN = ("average", "forgetting", "backward_transfer", "retain_average", "objective")
SHOWN += ("average_incremental", "last", "performance_drop")  # where classes come in stages
SHOWN += ("last_i2t_r1", "last_t2i_r1", "mean_i2t_r1", "mean_t2i_r1")  # of images and captions
SHOWN += ("adoption", "stale_answers", "collateral_forgetting")  # where answers were superseded


def show(scores: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the matrix (content of `scores.json`) and its summary; colours only on a terminal."""
    console = _console(file)
    console.print(_table(scores, plain=not console.is_terminal))
    console.print(line(scores["summary"]), highlight=False)


def compare(groups: Sequence[Group], file: TextIO | None = None) -> None:
    """Print a row per group: mean +- 95 % interval over its seeds, the best final mean first."""
    console = _console(file)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    table.add_column("method", no_wrap=True)
    titles, first = numbers(groups), main_number(groups)
    for name in ("seeds", *titles.values()):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(group, {key: interval(group.summary(key)) for key in titles}) for group in groups]
    rows.sort(key=lambda row: row[1][first].mean if row[1][first] else -1.0, reverse=True)
    for group, found in rows:
        table.add_row(group.label, str(len(group.runs)), *map(_told, found.values()))
    console.print(table)


def _told(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" if math.isnan(found.half) else f"{found.mean:.3f} ± {found.half:.3f}"


def _console(file: TextIO | None) -> Console:
    console = Console(file=file)
    if console.is_terminal:
        return console
    # a log file has no edge to wrap at
    return Console(file=file, width=10_000, color_system=None)


def line(summary: Mapping[str, float | None]) -> str:
    """The summary's main numbers in one line; what is undefined is left out."""
    known = {name: summary.get(name) for name in SHOWN}
    return "   ".join(
        f"{name.replace('_', ' ')} {x:.3f}" for name, x in known.items() if x is not None
    )


def _table(scores: Mapping[str, Any], *, plain: bool) -> Table:
    tasks, retain, rows = list(scores["tasks"]), list(scores["retain"]), scored(scores)
    set_apart = bool(retain) and not plain
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD)
    table.add_column("after", no_wrap=True)
    for name in tasks:
        table.add_column(name, justify="right", no_wrap=True)
    if set_apart:
        table.add_column("|", style="dim")
    for name in retain:
        table.add_column(f"({name})", justify="right", no_wrap=True)
    for row, values in zip(rows, matrix(rows, tasks + retain), strict=True):
        cells = [
            _cell(value, learnt=name == row["after"])
            for name, value in zip(tasks + retain, values, strict=True)
        ]
        rule = [Text("|")] if set_apart else []
        table.add_row(row["after"], *cells[: len(tasks)], *rule, *cells[len(tasks) :])
    constant = scores.get(CONSTANT, {})
    if constant:  # runs of before it was scored have none
        told = [f"{constant[name]:.3f}" if name in constant else "-" for name in tasks + retain]
        rule = ["|"] if set_apart else []
        table.add_section()
        table.add_row(
            "one answer", *told[: len(tasks)], *rule, *told[len(tasks) :], style="dim italic"
        )
    return table


def _cell(value: float, *, learnt: bool) -> Text:
    if math.isnan(value):
        return Text("-", style="dim")
    step = min(int(min(max(value, 0.0), 1.0) * len(HEAT)), len(HEAT) - 1)
    weight = "bold underline " if learnt else ""
    return Text(f"{value:.3f}", style=f"{weight}{INK[step]} on {HEAT[step]}")
