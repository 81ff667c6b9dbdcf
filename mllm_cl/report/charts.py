"""The geometry of line charts and of intervals; the template draws them, so that colours follow the
reader's light or dark page.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mllm_cl.report.series import Panel, Series
from mllm_cl.report.stages import Curve, Plane

WIDTH, HEIGHT = 420, 230
LEFT, TOP, BOTTOM = 34, 12, 46  # room around the lines; names may be slanted below
LETTER = 6.3  # width of a letter of the labels, about
NUM_COLOURS = 8  # of the palette in page.css; after that, lines are dashed


@dataclass(frozen=True)
class Line:
    """A drawn series: paths in SVG's own language, dots as (x, y, what it is)."""

    label: str
    colour: int
    dashed: bool
    path: str
    faint: str
    band: str
    dots: list[tuple[float, float, str]]
    end: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Lines over the stages of a run, labelled at their ends."""

    title: str
    lines: list[Line]
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    right: float
    slanted: bool
    in_place: bool = False  # lines are named where they end
    width: int = WIDTH
    height: int = HEIGHT
    bottom: float = HEIGHT - BOTTOM
    left: float = LEFT


def chart(panel: Panel) -> Chart:
    """The geometry of a panel."""
    series, names, top = panel.series, panel.names, panel.top
    longest = max(len(_short(one.label)) for one in series)
    right = WIDTH - 14 - LETTER * longest
    step = (right - LEFT) / max(1, len(names) - 1)
    place = {name: LEFT + step * i for i, name in enumerate(names)}
    lines = [_line(one, i, place, top) for i, one in enumerate(series)]
    slanted = any(LETTER * len(_short(name)) > step for name in names)
    return Chart(
        panel.title,
        _apart(lines),
        xticks=[(round(x, 1), _short(name)) for name, x in place.items()],
        yticks=[(round(_height(y, top), 1), f"{y:.2g}") for y in _ticks(top)],
        right=right,
        slanted=slanted,
        height=HEIGHT if slanted else HEIGHT - BOTTOM + 24,
    )


def _line(one: Series, index: int, place: Mapping[str, float], top: float) -> Line:
    points = [(name, place[name], one.values.get(name, math.nan)) for name in place]
    known = [(name, x, y) for name, x, y in points if not math.isnan(y)]
    names = [name for name, _, _ in known]
    first = names.index(one.start) if one.start in names else 0
    counted = known[first:]
    dots = [
        (round(x, 1), round(_height(y, top), 1), f"{one.label}, after {name}: {y:.3f}")
        for name, x, y in counted
    ]
    band = [
        (x, y - one.halves[name], y + one.halves[name])
        for name, x, y in counted
        if not math.isnan(one.halves.get(name, math.nan))
    ]
    around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
    x, y, _ = dots[-1]
    return Line(
        _short(one.label),
        index % NUM_COLOURS,
        index >= NUM_COLOURS,
        _path([(x, y) for _, x, y in counted], top),
        _path([(x, y) for _, x, y in known[: first + 1]], top) if first else "",
        f"{_path(around, top)}Z" if len(band) > 1 else "",
        dots,
        (x, y),
    )


def plane(shown: Plane) -> Chart:
    """The geometry of curves over a scale of numbers."""
    right = WIDTH - 14 - LETTER * max(len(_short(one.label)) for one in shown.curves)
    every = [x for x, _ in shown.ticks] + [p.x for one in shown.curves for p in one.points]
    least, most = min(every), max(every)

    def place(x: float) -> float:
        return LEFT + (right - LEFT) * (x - least) / ((most - least) or 1)

    lines = [_curve(one, place) for one in shown.curves]
    if not shown.in_place:
        lines = _apart(lines, gap=min(12.0, (HEIGHT - BOTTOM - TOP) / len(lines)))
    return Chart(
        shown.title,
        lines,
        xticks=[(round(place(x), 1), text) for x, text in shown.ticks],
        yticks=[(round(_height(y, 1.0), 1), f"{y:.2g}") for y in _ticks(1.0)],
        right=right,
        slanted=False,
        in_place=shown.in_place,
        height=HEIGHT - BOTTOM + 24,
    )


def _curve(one: Curve, place: Callable[[float], float]) -> Line:
    dots, high, low = [], [], []
    for point in one.points:
        x, y, half = place(point.x), point.y.mean, point.y.half
        told = f"{one.label}, {point.where}: {y:.3f}"
        if not math.isnan(half):
            told += f" ± {half:.3f}"
            high, low = [*high, (x, y + half)], [(x, y - half), *low]
        dots.append((round(x, 1), round(_height(y, 1.0), 1), told))
    path = _path([(place(point.x), point.y.mean) for point in one.points], 1.0)
    band = f"{_path([*high, *low], 1.0)}Z" if len(high) > 1 else ""
    dashed, colour = one.number >= NUM_COLOURS, one.number % NUM_COLOURS
    return Line(_short(one.label), colour, dashed, path, "", band, dots, dots[-1][:2])


def _path(points: Sequence[tuple[float, float]], top: float) -> str:
    return "".join(
        f"{'L' if i else 'M'}{x:.1f} {_height(min(max(y, 0.0), top), top):.1f}"
        for i, (x, y) in enumerate(points)
    )


def _height(y: float, top: float) -> float:
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - min(max(y, 0.0), top) / top)


def _apart(lines: list[Line], gap: float = 12.0) -> list[Line]:
    """The lines with their labels moved up or down until none covers another."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].end[1])
    heights = [lines[i].end[1] for i in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overshoot = max(0.0, heights[-1] - (HEIGHT - BOTTOM - 2))
    if overshoot:
        heights[-1] -= overshoot
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    placed = list(lines)
    for i, y in zip(order, heights, strict=True):
        placed[i] = Line(**{**vars(lines[i]), "end": (lines[i].end[0], round(y, 1))})
    return placed


def _ticks(top: float) -> list[float]:
    return [top * share for share in (0, 0.25, 0.5, 0.75, 1)]


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


@dataclass(frozen=True)
class Strip:
    """A mean, its interval and every seed on a scale from 0 to 1, as percentages of the width."""

    mean: float
    low: float | None
    high: float | None
    seeds: list[float]


def strip(mean: float, half: float, values: Sequence[float]) -> Strip:
    """Where to draw them; what lies outside the scale is drawn at its end."""

    def place(value: float) -> float:
        return round(100 * min(max(value, 0.0), 1.0), 1)

    alone = math.isnan(half)
    return Strip(
        place(mean),
        None if alone else place(mean - half),
        None if alone else place(mean + half),
        [place(value) for value in values],
    )
