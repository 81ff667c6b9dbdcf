"""Tasks and their order: the unit of a continual run is the sequence, not the data set."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.utils.data import Subset

from mllm_cl.metrics.pairs import Metric

Sample = dict[str, object]
Asked, Found = TypeVar("Asked"), TypeVar("Found")


@dataclass(frozen=True)
class Task:
    """One step of a continual run: what is trained on, what is scored, and how.

    `train` and `eval` are map-style sequences of samples
    `{"id": str, "messages": [...], "images": [PIL.Image]}` whose last message is the assistant's.
    A sample may have `references`, a list of right answers, to be scored against in its place.
    `metric` maps (predictions, references) to [0, 1], higher is better.
    `labels` holds class names that appear first here, `earlier` those of the tasks before it in
    their order; both are empty for instruction tuning.
    `supersedes` names an earlier task whose answers this one replaces: nobody protects those.
    """

    name: str
    index: int
    train: Sequence[Sample]
    eval: Sequence[Sample]
    metric: Metric
    labels: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    supersedes: str | None = None


@dataclass(frozen=True)
class TaskSequence:
    """The tasks in the order in which they are learnt, and the sets that are only retained.

    `retain` names what the model knows before the first task: measured and scored, never trained
    on. `later` are tasks that the run ends before, of whose classes it is asked by name all the
    same.
    """

    tasks: tuple[Task, ...]
    retain: tuple[Task, ...] = field(default=())
    later: tuple[Task, ...] = field(default=())
    _found: dict[tuple, tuple] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [task.name for task in (*self.retain, *self.tasks)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"task names must be unique, but these appear twice: {', '.join(twice)}"
            )

    def before(self, index: int) -> "tuple[Task, ...]":
        """The tasks before the `index`-th (from 1) whose answers still hold when it is learnt."""
        replaced = {task.supersedes for task in self.tasks[:index]}
        return tuple(task for task in self.tasks[: index - 1] if task.name not in replaced)

    def once(self, find: Callable[[Asked], Found], asked: Asked) -> Found:
        """find(asked), as of a set of samples, found out once in a run, however many stages ask."""
        key = find, id(asked)
        if key not in self._found:
            self._found[key] = find(asked), asked  # held, or another one could get its id
        return self._found[key][0]

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]


def kept_samples(task: Task, budget: int, seed: int) -> tuple[Sequence[Sample], int]:
    """The first samples of a seeded order that fit into `budget` bytes, and what they take."""
    generator = torch.Generator().manual_seed(seed * 7919 + task.index)
    chosen, total = [], 0
    for index in torch.randperm(len(task.train), generator=generator).tolist():
        size = num_bytes(task.train[index])
        if total + size > budget:
            break
        chosen.append(index)
        total += size
    return Subset(task.train, chosen), total


def num_bytes(sample: Sample) -> int:
    """What keeping a sample costs: its text as UTF-8 and its images as PNG."""
    text = sum(len(_text(message["content"]).encode()) for message in sample["messages"])
    return text + sum(_png_bytes(image) for image in sample["images"] or ())


def _text(content: str | list[dict]) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(part.get("text") or "" for part in parts)


def _png_bytes(image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.tell()
