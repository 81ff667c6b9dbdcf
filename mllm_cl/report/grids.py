"""What the pictures of a report show: tables of numbers, averaged over seeds, layers or tasks.

Absent numbers are NaN: nothing is made up for a stage that was not recorded.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mllm_cl.metrics.scores import matrix
from mllm_cl.report.runs import Group, Run, Stage, scored

DRIFTS = {
    "inputs": "Inputs",
    "router": "Routers",
    "experts": "Experts and other trained layers",
}
ROUTING = {
    "overlap": "Experts that stayed",
    "rerouting_accuracy": "Tokens routed exactly as when learnt",
    "entropy": "Entropy of routing",
}


@dataclass(frozen=True)
class Grid:
    """A table of numbers with names: rows, columns, and cells that deserve a mark."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    marks: set[tuple[int, int]] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        return all(math.isnan(value) for line in self.values for value in line)

    @property
    def top(self) -> float:
        """The largest number, 0 of none."""
        return max((x for line in self.values for x in line if not math.isnan(x)), default=0.0)


def mean(values: Iterable[float]) -> float:
    """The mean of those that are numbers, NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def scores(group: Group, columns: Sequence[str], title: str, key: str = "scores") -> Grid:
    """The matrix of a group, the mean over its seeds; the cell of the task just learnt is marked.

    The rows are those of the seed that has come farthest; a cell is the mean of who has it.
    """
    rows = max((scored(run.scores) for run in group.runs), key=len)
    names = [row["after"] for row in rows]
    each = [_aligned(run, names, columns, key) for run in group.runs]
    values = [
        [mean(one[i][j] for one in each) for j in range(len(columns))] for i in range(len(names))
    ]
    marks = {(i, columns.index(name)) for i, name in enumerate(names) if name in columns}
    return Grid(title, names, list(columns), values, marks)


def _aligned(run: Run, names: Sequence[str], columns: Sequence[str], key: str) -> list[list[float]]:
    known = {row["after"]: row for row in run.scores["rows"]}
    return matrix([known.get(name, {"after": name}) for name in names], columns, key)


# Drift: entries of drift.json are (stage, task, module, numbers).

Entry = tuple[Stage, str, str, Mapping[str, float]]


def _entries(run: Run) -> Iterator[Entry]:
    for stage in run.stages:
        for name, numbers in stage.drift.items():
            task, _, module = name.rpartition("::")
            yield stage, task, module, numbers


def _since(run: Run) -> Iterator[Entry]:
    """The entries of tasks after the stage that learnt them: there they have not drifted yet."""
    learnt: dict[str, int] = {}
    for stage, task, module, numbers in _entries(run):
        if learnt.setdefault(task, stage.number) < stage.number:
            yield stage, task, module, numbers


def _table(
    group: Group,
    key: str,
    place: Callable[[Entry], tuple[str, str]],
    entries: Callable[[Run], Iterator[Entry]],
) -> dict[tuple[str, str], float]:
    """The mean of `key` for every (row, column) that `place` names; over seeds last."""
    each = []
    for run in group.runs:
        cells: dict[tuple[str, str], list[float]] = {}
        for entry in entries(run):
            if key in entry[3]:
                cells.setdefault(place(entry), []).append(entry[3][key])
        each.append({at: mean(found) for at, found in cells.items()})
    names = dict.fromkeys(at for cells in each for at in cells)
    return {at: mean(cells.get(at, math.nan) for cells in each) for at in names}


def stages(group: Group) -> list[str]:
    """After what each stage of the run stands, in order."""
    longest = max(group.runs, key=lambda run: len(run.stages))
    return [stage.after for stage in longest.stages]


def _grid(title: str, found: Mapping[tuple[str, str], float], rows, columns) -> Grid:
    values = [[found.get((row, column), math.nan) for column in columns] for row in rows]
    return Grid(title, list(rows), list(columns), values)


def by_task(group: Group, key: str, title: str) -> Grid:
    """Learnt task x stage: the mean over modules of one number of drift.json."""
    found = _table(group, key, lambda entry: (entry[1], entry[0].after), _entries)
    names = [name for name in (*group.retain, *group.tasks) if any(row == name for row, _ in found)]
    grid = _grid(title, found, names, stages(group))
    first = [
        next((j for j, value in enumerate(line) if not math.isnan(value)), 0)
        for line in grid.values
    ]
    return Grid(title, grid.rows, grid.columns, grid.values, set(enumerate(first)))


def by_layer(group: Group, key: str, title: str) -> Grid:
    """Layer x stage: the mean over tasks that were learnt before, of one number of drift.json."""
    modules = dict.fromkeys(entry[2] for run in group.runs for entry in _since(run))
    label = layers(modules)
    found = _table(group, key, lambda entry: (label[entry[2]], entry[0].after), _since)
    known = {row for row, _ in found}
    rows = sorted({name for name in label.values() if name in known}, key=_natural)
    later = [name for name in stages(group)[1:] if any(column == name for _, column in found)]
    return _grid(title, found, rows, later)


def over_stages(group: Group, key: str) -> dict[str, float]:
    """The mean over tasks learnt before, and over modules, by stage."""
    found = _table(group, key, lambda entry: ("", entry[0].after), _since)
    return {name: found[("", name)] for name in stages(group) if ("", name) in found}


def at_the_end(group: Group, keys: Sequence[str]) -> dict[str, dict[str, float]]:
    """For every task learnt before the last stage: each number there, the mean over modules."""
    final = stages(group)[-1] if stages(group) else ""
    found: dict[str, dict[str, float]] = {}
    for key in keys:
        cells = _table(group, key, lambda entry: (entry[1], entry[0].after), _since)
        for (task, after), value in cells.items():
            if after == final:
                found.setdefault(task, {})[key] = value
    return {name: found[name] for name in (*group.retain, *group.tasks) if name in found}


def covariance(group: Group, title: str) -> Grid:
    """Task s x task t: tr(U_s^T C_t U_s) / tr C_t, the mean over modules."""
    cells: dict[tuple[str, str], list[float]] = {}
    for run in group.runs:
        for stage in run.stages:
            for module in stage.covariance.values():
                for s, line in module.items():
                    for t, value in line.items():
                        cells.setdefault((s, t), []).append(value)
    found = {at: mean(values) for at, values in cells.items()}
    names = [n for n in (*group.retain, *group.tasks) if any(s == n for s, _ in found)]
    return _grid(title, found, names, names)


def layers(modules: Iterable[str]) -> dict[str, str]:
    """A short name of the layer that each module is in: its number, with its tower if several.

    A module outside numbered layers keeps its name.
    """
    places = {module: re.match(r"(.*?)\.(\d+)(?:\.|$)", module) for module in modules}
    stems = {found[1] for found in places.values() if found}
    short = {stem: stem.split(".")[-2] if "." in stem else stem for stem in stems}
    named = {}
    for module, found in places.items():
        number = f"{int(found[2])}" if found else module
        named[module] = f"{short[found[1]]} {number}" if found and len(stems) > 1 else number
    return named


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layer 10` after `layer 9`."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
