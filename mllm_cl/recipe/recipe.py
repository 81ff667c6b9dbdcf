"""The whole recipe: read from a file, checked block by block, and written again as it was meant."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from mllm_cl.recipe.blocks import (
    ADAPTER,
    ClassesBlock,
    DataBlock,
    EvalBlock,
    ModelBlock,
    RetainBlock,
    RetrievalBlock,
    TaskBlock,
    tell_apart,
)
from mllm_cl.recipe.convert import convert, plain
from mllm_cl.recipe.descriptions import descriptions_print
from mllm_cl.recipe.errors import RecipeError, unknown
from mllm_cl.recipe.hints import Between
from mllm_cl.recipe.method import (
    check_decay,
    check_superseded,
    method_block,
    written_method,
)
from mllm_cl.recipe.read import parse, put, read_file, refuse_remote_code, split_overrides
from mllm_cl.recipe.texts import read_texts
from mllm_cl.recipe.training import BOOKKEEPING, training_block, training_names

if TYPE_CHECKING:
    from mllm_cl.method import Method

# What may stand in the place of `tasks`, and which setting it is.
STREAMS = {
    "classes": (ClassesBlock, "class_incremental"),
    "retrieval": (RetrievalBlock, "retrieval"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a continual run except the hardware.

    `classes`, in the place of a file's `tasks`, makes it class-incremental, and `retrieval` one of
    images and captions: `tasks` are then its stages.
    """

    output_dir: str
    model: ModelBlock
    method: "Method"
    method_name: str
    tasks: tuple[TaskBlock, ...]
    classes: ClassesBlock | None = None
    retrieval: RetrievalBlock | None = None
    retain: tuple[RetainBlock, ...] = ()
    data: DataBlock = field(default_factory=DataBlock)
    training: dict[str, Any] = field(default_factory=dict)
    eval: EvalBlock = field(default_factory=EvalBlock)
    seed: int = 0
    memory: str | None = None  # what `mllm-cl measure` found: protected from the first task on
    notes: tuple[str, ...] = field(default=(), compare=False)  # for the terminal, never saved

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe in a YAML file, after overrides such as `--seed 1` or `--method.damping=0.3`.

        Relative paths count from the working directory. An override of `method.name` leaves out
        what the new method does not take of the file's `method`; `notes` says so. Raises
        RecipeError, which names the file, the key, what was found and what was expected.
        """
        try:
            tree = read_file(Path(path))
        except RecipeError as error:
            raise RecipeError(error.key, error.problem, f"{path}") from None
        return cls.from_tree(tree, path, overrides)

    @classmethod
    def from_tree(
        cls, tree: dict[str, Any], source: str | os.PathLike, overrides: Sequence[str] = ()
    ) -> "Recipe":
        """The recipe of what a file would hold, as `load` reads it; errors name `source`."""
        given: dict[str, str] = {}
        try:
            given.update(split_overrides(overrides))
            refuse_remote_code(tree, given)
            written = written_method(tree, given)
            for key, text in given.items():
                put(tree, key, parse(text, key))
            return _recipe(tree, Path(source).stem, written)
        except RecipeError as error:
            changed = [key for key in given if f"{error.key}.".startswith(f"{key}.")]
            where = f"{source} with --{changed[-1]} on the command line" if changed else f"{source}"
            raise RecipeError(error.key, error.problem, where) from None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, defaults filled in; `training` keeps only what was set.

        Loading what this returns gives an equal recipe.
        """
        model, method = dataclasses.asdict(self.model), dataclasses.asdict(self.method)
        own = {
            key: value
            for key, value in method.items()
            if key not in ADAPTER and (key, value) != ("seed", self.seed)
        }
        tree = {
            "seed": self.seed,
            "output_dir": self.output_dir,
            "model": {key: value for key, value in model.items() if value is not None},
            "method": {"name": self.method_name, **own},
            **self._sequence(),
            "retain": [dataclasses.asdict(data) for data in self.retain],
            **({} if self.of_images else {"data": dataclasses.asdict(self.data)}),
            "training": self.training,
            "eval": dataclasses.asdict(self.eval),
        }
        if self.memory is not None:
            tree["memory"] = self.memory
        return plain(tree, "")

    def _sequence(self) -> dict[str, Any]:
        """What is learnt, as a file says it."""
        for key in STREAMS:
            if vars(self)[key] is not None:
                return {key: dataclasses.asdict(vars(self)[key])}
        return {"tasks": [dataclasses.asdict(task) for task in self.tasks]}

    @property
    def stream(self) -> ClassesBlock | RetrievalBlock | None:
        """What stands in the place of `tasks`."""
        return next((vars(self)[key] for key in STREAMS if vars(self)[key] is not None), None)

    @property
    def of_images(self) -> bool:
        """Whether an image encoder learns, from one of `STREAMS`."""
        return self.stream is not None

    def save(self, path: str | os.PathLike) -> None:
        """Write the resolved recipe as YAML, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            yaml.safe_dump(self.resolved(), file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def stage(self, index: int) -> dict[str, Any]:
        """What decides the numbers of task `index`: without later tasks, places and logging.

        Index -1 is the stage before any training.
        """
        if not -1 <= index < len(self.tasks):
            raise ValueError(f"found stage {index}, expected -1 to {len(self.tasks) - 1}")
        tree = self.resolved()
        del tree["output_dir"]
        if self.retrieval is not None:
            tree["retrieval"]["stages"] = index + 1
        elif self.classes is None:
            tree["tasks"] = tree["tasks"][: index + 1]
        else:
            tree["classes"] |= self.classes.up_to(index + 1)
            if self.classes.texts is not None:
                texts = json.dumps(read_texts(self.classes.texts), sort_keys=True)
                tree["classes"]["texts"] = hashlib.sha256(texts.encode()).hexdigest()
            if self.classes.descriptions is not None:
                tree["classes"]["descriptions"] = descriptions_print(self.classes.descriptions)
        for key in [key for key in tree["training"] if key.startswith(BOOKKEEPING)]:
            del tree["training"][key]
        if self.method_name.endswith(".py"):
            tree["method"]["name"] = _digest(self.method_name)
        if self.memory is not None:
            tree["memory"] = _digest(self.memory)
        return tree

    def fingerprint(self, index: int) -> str:
        """16 hex digits that are the same when `stage(index)` is the same."""
        text = json.dumps(self.stage(index), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _recipe(tree: dict[str, Any], stem: str, written: Mapping[str, Any]) -> Recipe:
    """The recipe that a tree says; `written` is what `written_method` says of it."""
    known = (
        "seed",
        "output_dir",
        "model",
        "method",
        "tasks",
        *STREAMS,
        "retain",
        "data",
        "training",
        "eval",
        "memory",
    )
    for name, value in tree.items():
        if name not in known:
            raise unknown(name, value, known, _homes(tree))
    for name in ("model", "method"):
        if name not in tree:
            raise RecipeError(name, "is missing")
    empty: dict[str, Any] = {"retain": [], "data": {}, "training": {}, "eval": {}}
    # `training:` with nothing below it reads as null and means no settings
    tree = empty | {name: x for name, x in tree.items() if x is not None or name not in empty}
    seed = convert(tree.get("seed", 0), Annotated[int, Between(0, 2**32 - 1)], "seed")
    output_dir = convert(tree.get("output_dir", f"runs/{stem}"), str, "output_dir")
    if not output_dir or Path(output_dir).is_file():
        raise RecipeError("output_dir", f"found {output_dir!r}, expected a folder")
    memory = convert(tree.get("memory"), str | None, "memory")
    if memory is not None and not Path(memory).is_file():
        problem = f"found {memory!r}, expected a file that mllm-cl measure has written"
        raise RecipeError("memory", problem)
    key, stream, tasks = _learnt(tree)
    retain = convert(tree["retain"], tuple[RetainBlock, ...], "retain")
    tell_apart({"tasks": tasks, "retain": retain})
    training = training_block(convert(tree["training"], dict[str, Any], "training"))
    data = convert(tree["data"], DataBlock, "data")
    evaluation = convert(tree["eval"], EvalBlock, "eval")
    model = convert(tree["model"], ModelBlock, "model")
    # last, since it imports torch
    setting = STREAMS[key][1] if key in STREAMS else "instruction"
    name, method, model, notes = method_block(tree["method"], model, seed, written, setting)
    check_superseded(tasks, name, method)
    check_decay(method, training)
    return Recipe(
        seed=seed,
        output_dir=output_dir,
        model=model,
        method=method,
        method_name=name,
        tasks=tasks,
        **({key: stream} if key in STREAMS else {}),
        retain=retain,
        data=data,
        training=training,
        eval=evaluation,
        memory=memory,
        notes=notes,
    )


def _learnt(
    tree: Mapping[str, Any],
) -> tuple[str, ClassesBlock | RetrievalBlock | None, tuple[TaskBlock, ...]]:
    """What is learnt: the key that it stands under, its block if it is no list of tasks, and the
    tasks.
    """
    key = next((one for one in STREAMS if tree.get(one) is not None), "tasks")
    if key == "tasks":
        if "tasks" not in tree:
            raise RecipeError("tasks", "is missing")
        return key, None, convert(tree["tasks"], tuple[TaskBlock, ...], "tasks")
    for name in ("tasks", "retain", "memory", *(one for one in STREAMS if one != key)):
        if tree.get(name):
            problem = f"found beside {key!r}, whose stages are the tasks; remove one of the two"
            raise RecipeError(name, problem)
    if tree.get("data"):
        raise RecipeError("data", f"found beside {key!r}, of whose images it says nothing")
    stream = convert(tree[key], STREAMS[key][0], key)
    return key, stream, stream.tasks()


def _homes(tree: Mapping[str, Any]) -> dict[str, str]:
    """Where a key that was put at the top level belongs."""
    homes = {name: f"training.{name}" for name in training_names()}
    blocks = {"model": ModelBlock, "data": DataBlock, "eval": EvalBlock}
    blocks |= {key: kind for key, (kind, _) in STREAMS.items() if key in tree}
    for key, kind in blocks.items():
        homes |= {each.name: f"{key}.{each.name}" for each in dataclasses.fields(kind)}
    return homes
