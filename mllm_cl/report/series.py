"""The lines that a report draws: scores over time, and drift and routing over the stages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mllm_cl.report import grids
from mllm_cl.report.grids import DRIFTS, ROUTING
from mllm_cl.report.interval import interval
from mllm_cl.report.runs import Group


@dataclass(frozen=True)
class Series:
    """One line: y by the name of x, with half the width of an interval where there is one.

    `start` is the x at which it begins to count: what lies before is drawn faintly.
    """

    label: str
    values: Mapping[str, float]
    halves: Mapping[str, float] = field(default_factory=dict)
    start: str | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over the same names, from 0 to `top`."""

    title: str
    series: list[Series]
    names: list[str]
    top: float = 1.0


def over_time(group: Group) -> list[Panel]:
    """Each task's score over the stages, and of what was known before; seeds as intervals."""
    found = []
    for columns, title in ((group.tasks, "tasks"), (group.retain, "known before")):
        grid = grids.scores(group, columns, title)
        series = [_score(group, grid, j) for j in range(len(columns))]
        found.append(Panel(title, series, grid.rows))
    return _drawable(found)


def _score(group: Group, grid: grids.Grid, column: int) -> Series:
    name = grid.columns[column]
    values = {row: line[column] for row, line in zip(grid.rows, grid.values, strict=True)}
    each = [{row["after"]: row["scores"] for row in run.scores["rows"]} for run in group.runs]
    halves = {row: _half(one.get(row, {}).get(name) for one in each) for row in grid.rows}
    return Series(name, values, halves, start=name if name in grid.rows else None)


def _half(values: Iterable[float | None]) -> float:
    found = interval([value for value in values if value is not None])
    return math.nan if found is None else found.half


def drifts(groups: Sequence[Group]) -> list[Panel]:
    """The three drifts over the stages, on one scale: a line per method, or per task of one."""
    series = {title: _lines(groups, key) for key, title in DRIFTS.items()}
    every = [x for some in series.values() for one in some for x in one.values.values()]
    top = round_up(max((x for x in every if not math.isnan(x)), default=1.0))
    return _drawable([Panel(title, some, _names(groups), top) for title, some in series.items()])


def routing(groups: Sequence[Group]) -> list[Panel]:
    """Overlap, re-routing accuracy and entropy over the stages."""
    return _drawable(
        [Panel(title, _lines(groups, key), _names(groups)) for key, title in ROUTING.items()]
    )


def _lines(groups: Sequence[Group], key: str) -> list[Series]:
    if len(groups) == 1:
        grid = grids.by_task(groups[0], key, "")
        lines = zip(grid.rows, grid.values, strict=True)
        return [Series(name, dict(zip(grid.columns, line, strict=True))) for name, line in lines]
    found = []
    for group in groups:
        known, places = grids.over_stages(group, key), _places(groups, group)
        found.append(Series(group.label, {places[name]: x for name, x in known.items()}))
    return found


def _names(groups: Sequence[Group]) -> list[str]:
    """The stages: from the first on for one method, and for several those that can have drifted."""
    longest = max(groups, key=lambda group: len(grids.stages(group)))
    return list(_places(groups, longest).values())[1 if len(groups) > 1 else 0 :]


def _places(groups: Sequence[Group], group: Group) -> dict[str, str]:
    """What each stage of a group is called beside other groups: a number if their tasks differ."""
    names = grids.stages(group)
    if len({tuple(one.tasks) for one in groups}) == 1:
        return {name: name for name in names}
    return {name: f"task {i}" for i, name in enumerate(names)}


def _drawable(panels: Sequence[Panel]) -> list[Panel]:
    """Those with two stages at least, less the lines without a number."""
    found = []
    for panel in panels:
        series = [one for one in panel.series if not all(map(math.isnan, one.values.values()))]
        if series and len(panel.names) > 1:
            found.append(Panel(panel.title, series, panel.names, panel.top))
    return found


def round_up(value: float) -> float:
    """Where a scale ends that has to hold `value`: a number whose quarters are short."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if value <= s * power * 1.0001)
