"""The report as one HTML page that needs nothing else: no network, no scripts, no other file."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.report import charts, grids, series, stages, words
from mllm_cl.report.charts import Chart, Strip
from mllm_cl.report.costs import cost, duration, size
from mllm_cl.report.grids import DRIFTS, ROUTING, Grid
from mllm_cl.report.interval import Interval, interval
from mllm_cl.report.runs import Group

HERE = Path(__file__).parent
SPLIT = {
    "inputs": "inputs",
    "router": "routers",
    "experts": "experts",
    "overlap": "experts that stayed",
    "overlap_by_inputs": "… had only the inputs moved",
    "overlap_by_router": "… had only the routers moved",
}


@dataclass(frozen=True)
class Figure:
    """What one group of runs contributes to a section."""

    label: str
    grids: list[Grid]


@dataclass(frozen=True)
class Tile:
    """A number to see first, and what it is."""

    value: str
    name: str
    note: str = ""


def page(groups: Sequence[Group]) -> str:
    """The HTML of a report on these groups of runs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": _number, "size": size, "duration": duration}
    templates.filters |= {"short": _short, "width": _width}
    return templates.get_template("page.jinja").render(**_content(groups))


def _content(groups: Sequence[Group]) -> dict[str, Any]:
    best, layers = _best(groups), _figures(groups, _layers)
    runs = [run for group in groups for run in group.runs]
    return {
        "title": _title(groups),
        "told": words.told(groups),
        "subtitle": _subtitle(groups),
        "groups": groups,
        "replicated": any(len(group.runs) > 1 for group in groups),
        "banded": any(len(group.runs) > 2 for group in groups),
        "best": best,
        "matrix": _matrix(best),
        "tiles": _tiles(best),
        "rows": _method_rows(groups) if len(runs) > 1 else [],
        "compared": list(words.numbers(groups).values()),
        "of_classes": all(group.of_classes for group in groups),
        "of_pairs": all(group.of_pairs for group in groups),
        "of_images": all(group.of_classes or group.of_pairs for group in groups),
        "by_name": bool(stages.by_name(groups)),
        "curves": [charts.plane(one) for one in stages.planes(groups)],
        "repeated": [note for group in groups if (note := _repeated(group))],
        "alike": len({(*group.tasks, "|", *group.retain) for group in groups}) == 1,
        "times": [(group.label, _charts(series.over_time(group))) for group in groups],
        "matrices": [(group.label, _matrix(group)) for group in groups] if len(groups) > 1 else [],
        "drift_trends": _charts(series.drifts(groups)),
        "drift_layers": layers,
        "drift_top": max((grid.top for figure in layers for grid in figure.grids), default=1.0),
        "split": [(group.label, grids.at_the_end(group, list(SPLIT))) for group in groups],
        "split_names": SPLIT,
        "routing_trends": _charts(series.routing(groups)) if len(groups) > 1 else [],
        "routing": _figures(groups, _routing),
        "covariance": _figures(groups, lambda group: [grids.covariance(group, "")]),
        "losses": _figures(groups, _losses),
        "costs": [row for group in groups if (row := cost(group))],
        "runs": [(group.label, run) for group in groups for run in group.runs],
        "numbers": _all_numbers(groups),
    }


def _charts(panels: Sequence[series.Panel]) -> list[Chart]:
    return [charts.chart(panel) for panel in panels]


def _figures(groups: Sequence[Group], make: Callable[[Group], list[Grid]]) -> list[Figure]:
    """What each group has to show; groups without data are left out."""
    found = []
    for group in groups:
        shown = [grid for grid in make(group) if not grid.empty]
        if shown:
            found.append(Figure(group.label, shown))
    return found


def _matrix(group: Group) -> tuple[Grid, Grid]:
    return grids.scores(group, group.tasks, ""), grids.scores(group, group.retain, "")


def _losses(group: Group) -> list[Grid]:
    return [grids.scores(group, [*group.tasks, *group.retain], "", "losses")]


def _layers(group: Group) -> list[Grid]:
    return [grids.by_layer(group, key, title) for key, title in DRIFTS.items()]


def _routing(group: Group) -> list[Grid]:
    return [grids.by_task(group, key, title) for key, title in ROUTING.items()]


def _best(groups: Sequence[Group]) -> Group:
    """The group that scores best at the end, of those that learnt one task after another; of
    classes, the best that has come to the end.
    """
    key = words.main_number(groups)

    def rank(group: Group) -> tuple[bool, float]:
        able = group.trains and bool(group.summary("finetune"))
        return group.finished if group.of_classes else able, _final(group, key)

    return max(groups, key=rank)


def _final(group: Group, key: str) -> float:
    found = interval(group.summary(key))
    return -1.0 if found is None else found.mean


def _title(groups: Sequence[Group]) -> str:
    runs = sum(len(group.runs) for group in groups)
    if len(groups) > 1:
        return f"{words.kinds(groups).capitalize()}, {runs} runs"
    label = groups[0].label
    if runs > 1:
        return f"{label}, {words.number(runs)} seeds"
    count = words.number(len(groups[0].tasks))
    if groups[0].of_classes:
        return f"{label} on {stages.num_classes(groups[0])} classes in {count} stages"
    return f"{label} on {count} tasks"


def _subtitle(groups: Sequence[Group]) -> str:
    recipes = [run.recipe for group in groups for run in group.runs]
    models = {str(recipe.get("model", {}).get("model_name_or_path", "?")) for recipe in recipes}
    blocks = [one[key] for one in recipes for key in ("classes", "retrieval") if key in one]
    data = dict.fromkeys(str(block["data"]) for block in blocks)
    orders = dict.fromkeys(" → ".join(group.tasks) for group in groups)
    return "  ·  ".join((", ".join(sorted(models)), *data, *orders))


def _tiles(group: Group) -> list[Tile]:
    tiles = _class_tiles(group) if group.of_classes else _task_tiles(group)
    spent = cost(group)
    if spent:
        state = f"{size(spent['state'])} kept per stage"
        tiles.append(Tile(duration(spent["total"]), "time of a run", state))
    return [tile for tile in tiles if tile.value]


def _class_tiles(group: Group) -> list[Tile]:
    found = {name: _told(interval(group.summary(name))) for name in words.OF_CLASSES}
    bytes_kept = stages.kept(group)
    handed_on = "" if bytes_kept is None else size(bytes_kept)
    return [
        Tile(found["last"], "A_B", "accuracy over all classes after the last stage"),
        Tile(found["average_incremental"], "Ā", "mean over stages of that over all classes seen"),
        Tile(found["performance_drop"], "PD", "after the first stage less after the last"),
        Tile(found["forgetting"], "forgotten", "best score minus the last, earlier stages"),
        Tile(found["harmonic_mean"], "old and new", f"{found['old']} and {found['new']}"),
        Tile(handed_on, "handed on", "by the last stage: trained weights and memory"),
    ]


def _task_tiles(group: Group) -> list[Tile]:
    found = {name: interval(group.summary(name)) for name in (*words.NUMBERS, "retain_change")}
    now, change = found["retain_average"], found["retain_change"]
    tiles = [
        Tile(_told(found["average"]), "at the end", "mean over all tasks learnt"),
        Tile(_told(found["finetune"]), "when new", "each task just after it was learnt"),
        Tile(_told(found["forgetting"]), "forgotten", "best score minus the last, earlier tasks"),
    ]
    if now and change:
        tiles.append(Tile(_told(now), "known before", f"was {now.mean - change.mean:.2f}"))
    kept = grids.at_the_end(group, ["rerouting_accuracy"])
    if kept:
        same = statistics.fmean(row["rerouting_accuracy"] for row in kept.values())
        tiles.append(Tile(f"{same:.2f}", "routed as when learnt", "share of old tasks' tokens"))
    return tiles


def _told(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.2f}" if math.isnan(found.half) else f"{found.mean:.2f} ± {found.half:.2f}"


def _method_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row per group, the best final mean first."""
    rows, first = [], words.main_number(groups)
    for group in sorted(groups, key=lambda one: _final(one, first), reverse=True):
        cells: list[tuple[str, Strip] | None] = []
        for key in words.numbers(groups):
            one = interval(group.summary(key))
            cells.append(one and (_told(one), charts.strip(one.mean, one.half, one.values)))
        spent = cost(group)
        time = duration(spent["total"]) if spent else ""
        row = {"label": group.label, "seeds": len(group.runs), "finished": group.finished}
        rows.append(row | {"cells": cells, "time": time})
    return rows


def _repeated(group: Group) -> str:
    draws = [(run.seed, run.order) for run in group.runs]
    twice = sorted({seed for seed, order in draws if draws.count((seed, order)) > 1}, key=str)
    if not twice:
        return ""
    return f"{group.label} has seed {', '.join(map(str, twice))} more than once: no replicates."


def _all_numbers(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Every number of the summaries, by name, of each group."""
    summaries = [run.scores["summary"] for group in groups for run in group.runs]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    found = {name: [_told(interval(group.summary(name))) for group in groups] for name in names}
    return {name.replace("_", " "): cells for name, cells in found.items() if any(cells)}


def _number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _short(name: str) -> str:
    name = re.sub(r"(?<=\d)-(?=\d)", "\N{NON-BREAKING HYPHEN}", name)  # a stage's places
    return name if len(name) <= 24 else f"{name[:23]}…"


def _width(names: Sequence[str]) -> str:
    """How wide cells are, in em, so that all columns of a table are alike and names fit."""
    longest = max(
        (len(part) for name in names for part in re.split(r"\s|-(?!\d)", name)), default=0
    )
    return f"{min(0.62 * longest + 0.6, 8.6):.1f}"
