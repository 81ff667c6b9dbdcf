"""A stage of a run as it lies in its folder: what made it, and what it had learnt."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mllm_cl import checkpoint, record
from mllm_cl.memory import load_tensors
from mllm_cl.method import names
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.recipe.read import read_file
from mllm_cl.recipe.recipe import STREAMS

# How what a run learnt leaves it.
DOORS = {
    "tasks": "`mllm-cl export` takes its models out",
    "classes": "`mllm-cl classify` answers with its models",
    "retrieval": "its models cannot leave it yet",
}


@dataclass(frozen=True)
class Stage:
    """A complete task of a run: its folder, its recipe, and what it had learnt."""

    run: Path
    number: int
    recipe: Recipe

    @property
    def path(self) -> Path:
        return record.stage_folder(self.run, self.number)

    @property
    def before(self) -> Path:
        """The folder of the stage that this one started from."""
        once = self.recipe.method.trains_once
        return record.stage_folder(self.run, 0 if once else self.number - 1)

    @property
    def task(self) -> str:
        return self.recipe.tasks[-1].name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes that were learnt, in the order in which they came."""
        return tuple(json.loads((self.path / "manifest.json").read_text())["classes"])

    @property
    def scored(self) -> list[int]:
        """The stages up to this one that have scores."""
        stages = range(self.number + 1)
        return [n for n in stages if (record.stage_folder(self.run, n) / "scores.json").exists()]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Everything that makes its model differ from the base."""
        return load_tensors(record.state_file(self.path))


def complete_stage(
    run: Path,
    task: str | None = None,
    *,
    learnt: str = "tasks",
    trust_remote_code: bool = False,
) -> Stage:
    """The stage of `run` that ends with `task`, by default the newest complete one.

    Raises RecipeError where there is none, a file of it was changed, or the run did not learn what
    `learnt` says: tasks, classes or retrieval.
    """
    done = {}
    for path in run.glob(f"task_*/{checkpoint.MARKER}"):
        number = path.parent.name.removeprefix("task_")
        if number.isdigit() and int(number):
            tree = json.loads((path.parent / "recipe.json").read_text())
            if learnt not in tree:
                found = next(key for key in ("tasks", *STREAMS) if key in tree)
                raise RecipeError("RUN", f"{run} learnt {found}: {DOORS[found]}")
            scores = json.loads((path.parent / "scores.json").read_text())
            done[scores["after"]] = int(number)
    if not done:
        raise RecipeError("RUN", f"{run} holds no complete task of a run")
    known = sorted(done, key=done.get)
    if task is not None and task not in done:
        raise RecipeError("--task", f"found {task!r}; complete in {run} are {', '.join(known)}")
    number = done[task or known[-1]]
    path = record.stage_folder(run, number)
    if not checkpoint.is_complete(path):
        problem = f"a file in {path} is not as it was written (damaged or edited)"
        raise RecipeError("RUN", f"{problem}; delete it, and run the recipe again")
    stage = Stage(run, number, _recipe_of(run, path, trust_remote_code))
    if not (stage.before / "memory.safetensors").exists():
        raise RecipeError("RUN", f"{stage.before} is gone, which {path} started from")
    return stage


def _recipe_of(run: Path, path: Path, trust_remote_code: bool) -> Recipe:
    """What made the stage at `path`, which has hashes alone of files beside the run."""
    tree = json.loads((path / "recipe.json").read_text())
    tree.pop("memory", None)  # part of the first stage's own by now
    setting = next((STREAMS[key][1] for key in STREAMS if key in tree), "instruction")
    if tree["method"]["name"] not in names(setting):
        tree["method"]["name"] = _as_given(run, "method", "name")
    hashes = {}
    if "classes" in tree:
        block = tree["classes"]
        hashes = {key: block[key] for key in ("texts", "descriptions") if block[key] is not None}
        # Pictures need not be here.
        block |= {"data": "toy:elsewhere", "captions": None}
        block |= {key: _as_given(run, "classes", key) for key in hashes}
    words = ["--model.trust_remote_code", "true"] if trust_remote_code else []
    recipe = Recipe.from_tree(tree, path / "recipe.json", words)
    now = recipe.stage(len(recipe.tasks) - 1)
    for key, written in hashes.items():
        if now["classes"][key] != written:
            problem = f"{vars(recipe.classes)[key]} says something else than when the run was made"
            raise RecipeError(f"classes.{key}", problem)
    return recipe


def _as_given(run: Path, block: str, key: str) -> str:
    """The place of a file that a stage knows by its hash."""
    if not (run / "recipe.yaml").exists():
        problem = f"'{block}.{key}' is a file of your own, whose place only a finished run tells"
        raise RecipeError("RUN", f"{problem}; run the recipe to its end first")
    return read_file(run / "recipe.yaml")[block][key]
