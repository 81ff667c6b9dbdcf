"""What run folders say, read without the model: scores, drift and cost of every stage, and which
runs are replicates of one another.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_cl.metrics.recall import summary as recall_summary
from mllm_cl.metrics.scores import ZERO_SHOT, table
from mllm_cl.metrics.stages import summary as stages_summary

# of a recipe, when replicates are looked for: the order of classes is a draw, as the seed is
_LEFT_OUT = ("seed", "tasks", "retain", "classes.order", "classes.stages", "retrieval.stages")


@dataclass(frozen=True)
class Stage:
    """One stage of a run; a file that the stage did not write is an empty mapping.

    `drift` is by `task::module`, `covariance` by module, then task, then task.
    """

    number: int
    after: str
    drift: Mapping[str, Mapping[str, float]]
    covariance: Mapping[str, Mapping[str, Mapping[str, float]]]
    cost: Mapping[str, Any]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: its matrix (content of `scores.json`), its recipe and its stages."""

    folder: Path
    scores: Mapping[str, Any]
    recipe: Mapping[str, Any]
    stages: tuple[Stage, ...]

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    @property
    def order(self) -> int | None:
        """The seed of the order of classes; None where they come in their own, or do not come."""
        return self.recipe.get("classes", {}).get("order")

    @property
    def of_classes(self) -> bool:
        """Whether its tasks are stages of new classes."""
        return "classes" in self.recipe

    @property
    def of_pairs(self) -> bool:
        """Whether images and captions find one another."""
        return "retrieval" in self.recipe

    @property
    def method(self) -> str:
        """The method's name, its file's if it is the user's own; the folder's if unknown."""
        name = self.recipe.get("method", {}).get("name")
        return self.folder.name if name is None else Path(str(name)).stem

    @property
    def settings(self) -> dict[str, Any]:
        """All settings but what is drawn and the tasks, by dotted key."""
        kept = {key: value for key, value in self.recipe.items() if key not in _LEFT_OUT}
        return {key: value for key, value in _flat(kept) if key not in _LEFT_OUT}

    @property
    def finished(self) -> bool:
        """Whether the last task has been learnt."""
        rows = self.scores["rows"]
        return bool(rows) and rows[-1]["after"] == self.scores["tasks"][-1]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed or the order of classes, and what to call them."""

    label: str
    runs: tuple[Run, ...]

    @property
    def tasks(self) -> list[str]:
        return list(self.runs[0].scores["tasks"])

    @property
    def retain(self) -> list[str]:
        return list(self.runs[0].scores["retain"])

    @property
    def of_classes(self) -> bool:
        return all(run.of_classes for run in self.runs)

    @property
    def of_pairs(self) -> bool:
        return all(run.of_pairs for run in self.runs)

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def trains(self) -> bool:
        """Whether anything is trained, as far as the stages say."""
        made = [stage.manifest for run in self.runs for stage in run.stages[-1:]]
        return not any(one.get("trained_parameters") == 0 for one in made)

    def summary(self, name: str) -> list[float]:
        """One number of the summary, of every run that has it."""
        found = [run.scores["summary"].get(name) for run in self.runs]
        return [value for value in found if value is not None]


def find(folders: Sequence[str | Path]) -> list[Path]:
    """The runs in `folders`: each is a run, or holds runs, as a sweep does.

    Raises ValueError for a folder that is neither.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        inner = [folder] if _is_run(folder) else sorted(filter(_is_run, _inside(folder)))
        if not inner:
            raise ValueError(
                f"{folder} holds no scores.json, and no run in a folder of its own; expected the "
                "output folder of a run or of a sweep, whose first stage at least is done"
            )
        found += [path for path in inner if path not in found]
    return found


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _is_run(folder: Path) -> bool:
    return (folder / "scores.json").is_file() or bool(_stage_folders(folder))


def _stage_folders(folder: Path) -> dict[int, Path]:
    """The stages that are done, in their order."""
    numbers = {
        int(found[1]): path.parent
        for path in folder.glob("task_*/scores.json")
        if (found := re.fullmatch(r"task_(\d+)", path.parent.name))
    }
    return dict(sorted(numbers.items()))


def load(folder: str | Path) -> Run:
    """A run from its folder, finished or not. Raises ValueError where it is none, or is damaged."""
    folder = Path(folder)
    done = _stage_folders(folder)
    stages = tuple(_stage(number, path) for number, path in done.items())
    recipe = _read(list(done.values())[-1] / "recipe.json") if done else {}
    return Run(folder, load_scores(folder), recipe, stages)


def load_scores(folder: str | Path) -> dict[str, Any]:
    """The matrix of a run: its `scores.json`, or that of the stages that are done so far.

    Raises ValueError when there is none or it cannot be read.
    """
    folder = Path(folder)
    if not _is_run(folder):
        raise ValueError(f"{folder} holds no scores.json; expected the output folder of a run")
    own = folder / "scores.json"
    if not own.is_file():
        return _scores_so_far(_stage_folders(folder))
    scores = _read(own)
    if not {"tasks", "retain", "rows", "summary"} <= scores.keys():
        raise ValueError(
            f"{own} is no score matrix: expected the keys tasks, retain, rows and summary"
        )
    return scores


def _scores_so_far(done: Mapping[int, Path]) -> dict[str, Any]:
    rows = [_row(path / "scores.json") for path in done.values()]
    recipe = _read(list(done.values())[-1] / "recipe.json")
    retain = [block["name"] for block in recipe.get("retain", ())]
    tasks = _planned(recipe)
    # What was scored but not yet learnt is still to come, in the order of the recipe.
    scored = (name for row in rows for name in row["scores"])
    tasks += [name for name in dict.fromkeys(scored) if name not in (*tasks, *retain)]
    blocks = recipe.get("tasks", ())
    replaced = {block["supersedes"]: block["name"] for block in blocks if block.get("supersedes")}
    found = table(tasks, retain, rows, replaced)
    if "classes" in recipe:
        found["summary"] |= stages_summary(rows)
    if "retrieval" in recipe:
        found["summary"] |= recall_summary(rows)
    return found


def _planned(recipe: Mapping[str, Any]) -> list[str]:
    """The tasks up to the newest stage; of classes all stages, which their number says."""
    if "retrieval" in recipe:
        return list(recipe["retrieval"]["words"])
    if "classes" not in recipe:
        return [block["name"] for block in recipe.get("tasks", ())]
    from mllm_cl.data.classes import stage_names, stage_sizes  # which imports torch

    block = recipe["classes"]
    return stage_names(stage_sizes(block["number"], block["first"], block["increment"]))


def scored(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that hold a score: before the first stage of classes there is none."""
    return [row for row in scores["rows"] if row["scores"]]


def _row(file: Path) -> dict[str, Any]:
    row = _read(file)
    if not {"after", "scores"} <= row.keys():
        raise ValueError(f"{file} is no row of a score matrix: expected the keys after and scores")
    return row


def _stage(number: int, folder: Path) -> Stage:
    parts = {name: _read(folder / f"{name}.json") for name in ("drift", "covariance", "cost")}
    after = _read(folder / "scores.json").get("after", ZERO_SHOT)
    return Stage(number, after, **parts, manifest=_read(folder / "manifest.json"))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. ValueError for anything else."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by everything but what is drawn, in the order in which they were given.

    A label is the method's name, with the settings in which groups of that method differ.
    """
    alike: list[list[Run]] = []
    for run in runs:
        for members in alike:
            if _replicates(run, members[0]):
                members.append(run)
                break
        else:
            alike.append([run])
    firsts = [members[0] for members in alike]
    return [Group(_label(members[0], firsts), tuple(members)) for members in alike]


def _replicates(one: Run, other: Run) -> bool:
    """Whether two runs differ in what is drawn alone, as far as both have come."""
    names = ("tasks", "retain")
    if one.settings != other.settings or any(one.scores[n] != other.scores[n] for n in names):
        return False
    blocks = [run.recipe.get("tasks", ()) for run in (one, other)]
    return all(a == b for a, b in zip(*blocks, strict=False))


def _label(run: Run, others: Sequence[Run]) -> str:
    rivals = [one for one in others if one.method == run.method]
    if len(rivals) == 1:
        return run.method
    keys = _telling([{**one.settings, **_data(one)} for one in rivals])
    own = {**run.settings, **_data(run)}
    said = [f"{key.rpartition('.')[2]} {_short(own.get(key))}" for key in keys]
    return f"{run.method} ({', '.join(said) or run.folder.name})"


def _telling(rivals: Sequence[Mapping[str, Any]]) -> list[str]:
    """As few settings as it takes to tell the rivals apart, those of the method first.

    None where no setting does.
    """

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(str(one.get(key)) for key in keys) for one in rivals})

    heads = ("method", "tasks", "classes", "retrieval", "training", "model")
    every = sorted({key for one in rivals for key in one})
    every.sort(key=lambda key: heads.index(key.split(".")[0]) if key.split(".")[0] in heads else 9)
    shared = [key for key in every if all(key in one for one in rivals)]
    every = shared if kinds(shared) == len(rivals) else every
    chosen: list[str] = []
    while kinds(chosen) < len(rivals):
        best = max(every, key=lambda key: kinds([*chosen, key]))
        if kinds([*chosen, best]) == kinds(chosen):
            return []
        chosen.append(best)
    return chosen


def _data(run: Run) -> dict[str, Any]:
    """What may differ in the data: which tasks, and how each is read."""
    blocks = {block["name"]: block for block in run.recipe.get("tasks", ())}
    return {"tasks": run.scores["tasks"]} | dict(_flat(blocks))


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any], head: str = ""):
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{head}{key}.")
        else:
            yield head + key, value
