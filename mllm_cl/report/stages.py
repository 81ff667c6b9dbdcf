"""Runs in stages, as curves: of classes accuracy over those seen, by name over all there are, and
over what is kept; of images and captions recall over the tasks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mllm_cl.metrics.recall import AT, RECALL
from mllm_cl.metrics.scores import ZERO_SHOT
from mllm_cl.metrics.stages import COUNTS, ZERO_SHOT_SCORES
from mllm_cl.report.costs import size
from mllm_cl.report.interval import Interval, interval
from mllm_cl.report.runs import Group, Run

BY_NAME = {  # what is asked by name, and how it is said
    "seen": "classes seen",
    "unseen": "classes to come",
    "harmonic_mean": "harmonic mean",
    "alignment": "cosine with own captions",
}


@dataclass(frozen=True)
class Point:
    """A number at a place on a scale, and what the place is called."""

    x: float
    y: Interval
    where: str


@dataclass(frozen=True)
class Curve:
    """Points from left to right that belong together; curves of one `number` have one colour."""

    label: str
    points: list[Point]
    number: int


@dataclass(frozen=True)
class Plane:
    """Curves over a scale of numbers, from 0 to 1 in height; `ticks` are places and their names.

    `in_place` are curves named where they end, not all in a list.
    """

    title: str
    curves: list[Curve]
    ticks: list[tuple[float, str]]
    in_place: bool = False


def seen(task: str) -> int:
    """How many classes were seen after a stage, which is called by their places: `51-60`."""
    return int(task.rpartition("-")[2])


def num_classes(group: Group) -> int:
    """How many classes there are after the last stage."""
    return seen(group.tasks[-1])


def accuracies(run: Run) -> dict[int, float]:
    """A_b by the number of classes seen: the accuracy over all test images of these."""
    found = {}
    for row in run.scores["rows"]:
        scores, counts = row["scores"], row.get(COUNTS, {})
        total = sum(counts.get(name, 0) for name in scores)
        if row["after"] != ZERO_SHOT and total:
            right = math.fsum(value * counts[name] for name, value in scores.items())
            found[seen(row["after"])] = right / total
    return found


def planes(groups: Sequence[Group]) -> list[Plane]:
    """All that the groups that learn classes or pairs have to show; none where nothing has two
    points.
    """
    pairs = [group for group in groups if group.of_pairs]
    groups = [group for group in groups if group.of_classes]
    return [*over_classes(groups), *by_name(groups), *over_memory(groups), *over_tasks(pairs)]


def over_classes(groups: Sequence[Group]) -> list[Plane]:
    """A_b over the classes seen: a line per method, seeds and class orders as intervals."""
    curves = [
        Curve(group.label, _points([accuracies(run) for run in group.runs]), number)
        for number, group in enumerate(groups)
    ]
    return _drawable("Accuracy over all classes seen, by their number", curves)


def by_name(groups: Sequence[Group]) -> list[Plane]:
    """Zero-shot accuracy over the classes seen, where stages were asked for it: of one method all
    its kinds, of several each kind with a line per method.
    """
    title = "Asked by name, among all classes"
    if len(groups) == 1:
        kinds = enumerate(BY_NAME.items())
        curves = [Curve(kind, _named(groups[0], key), number) for number, (key, kind) in kinds]
        return _drawable(title, curves)
    found = []
    for key, kind in BY_NAME.items():
        curves = [Curve(g.label, _named(g, key), number) for number, g in enumerate(groups)]
        found += _drawable(f"{title}: {kind}", curves)
    return found


def over_tasks(groups: Sequence[Group]) -> list[Plane]:
    """Recall both ways over all tasks so far, by their number: of one method at 1, 5 and 10, of
    several at 1 with a line per method.
    """
    found = []
    for way, said in (("i2t", "image to text"), ("t2i", "text to image")):
        if len(groups) == 1:
            lines = [(f"R@{k}", groups[0], f"{way}_r{k}") for k in AT]
        else:
            lines = [(group.label, group, f"{way}_r1") for group in groups]
        curves = [
            Curve(label, _points([_recall(run, key) for run in group.runs], "tasks"), number)
            for number, (label, group, key) in enumerate(lines)
        ]
        title = f"Recall{'' if len(groups) == 1 else '@1'}, {said}, over all tasks so far"
        found += _drawable(title, curves)
    return found


def _recall(run: Run, key: str) -> dict[int, float]:
    """One kind of recall by the number of tasks."""
    rows = [row[RECALL] for row in run.scores["rows"] if RECALL in row]
    return {number: row[key] for number, row in enumerate(rows, start=1)}


def _named(group: Group, key: str) -> list[Point]:
    return _points([_zero_shot(run, key) for run in group.runs])


def _zero_shot(run: Run, key: str) -> dict[int, float]:
    """One kind of zero-shot accuracy by the number of classes seen."""
    rows = [row for row in run.scores["rows"] if row.get(ZERO_SHOT_SCORES)]
    found = {
        0 if row["after"] == ZERO_SHOT else seen(row["after"]): row[ZERO_SHOT_SCORES].get(key)
        for row in rows
    }
    return {x: y for x, y in found.items() if y is not None}


def over_memory(groups: Sequence[Group]) -> list[Plane]:
    """The last A_B over the bytes that are kept between stages, on a logarithmic scale.

    Settings of one method are a line, so that several budgets are its accuracy-over-memory curve.
    """
    known, numbers = {}, {}
    for number, group in enumerate(groups):
        numbers.setdefault(group.runs[0].method, number)
        bytes_kept, last = kept(group), interval(group.summary("last"))
        if bytes_kept is not None and last is not None and group.finished:
            known.setdefault(group.runs[0].method, []).append((group.label, bytes_kept, last))
    every = [number for some in known.values() for _, number, _ in some]
    if len(every) < 2 or not any(every):
        return []
    least = math.floor(math.log10(min(number for number in every if number)))
    curves = []
    for method, some in known.items():
        points = [
            Point(_decades(number, least), last, f"{label}, {size(number)}")
            for label, number, last in sorted(some, key=lambda one: one[1])
        ]
        curves.append(Curve(method, points, numbers[method]))
    most = math.ceil(math.log10(max(every)) + 1e-9)
    ticks = [(float(power), size(10**power)) for power in range(least, most + 1)]
    if not all(every):
        ticks.insert(0, (_decades(0, least), "nothing"))
    return [Plane("Accuracy at the end, over the bytes that stages hand on", curves, ticks, True)]


def kept(group: Group) -> float | None:
    """Bytes of what the last stage hands on: all that was trained, and what is kept of the past;
    the mean over seeds.
    """
    last = [run.stages[-1] for run in group.runs if run.stages]
    known = [
        stage.cost["state_bytes"] + stage.manifest["memory_bytes"]
        for stage in last
        if "state_bytes" in stage.cost and "memory_bytes" in stage.manifest
    ]
    return sum(known) / len(known) if known else None


def _decades(number: float, least: int) -> float:
    """A place on a logarithmic scale; nothing at all lies a decade below the least."""
    return math.log10(number) if number else least - 1.0


def _points(each: Sequence[Mapping[int, float]], what: str = "classes") -> list[Point]:
    """What every replicate has at a place, together."""
    places = sorted({x for values in each for x in values})
    found = {x: interval([values[x] for values in each if x in values]) for x in places}
    return [Point(x, y, f"{x} {what}") for x, y in found.items() if y is not None]


def _drawable(title: str, curves: Iterable[Curve]) -> list[Plane]:
    """A plane of the curves, if there is one with two points."""
    curves = [curve for curve in curves if curve.points]
    if max((len(curve.points) for curve in curves), default=0) < 2:
        return []
    places = sorted({point.x for curve in curves for point in curve.points})
    step = -(-len(places) // 10)  # so many names fit below
    return [Plane(title, curves, [(x, f"{x:g}") for x in places[::-1][::step][::-1]])]
