"""Tasks and their order: the unit of a continual run is the sequence, not the data set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

Sample = dict[str, object]
Metric = Callable[[list[str], list[str]], float]


@dataclass(frozen=True)
class Task:
    """One step of a continual run: what is trained on, what is scored, and how.

    `train` and `eval` are map-style sequences of samples
    `{"id": str, "messages": [...], "images": [PIL.Image]}` whose last message is the assistant's.
    `metric` maps (predictions, references) to [0, 1], higher is better.
    `labels` holds class names that appear first here; it is empty for instruction tuning.
    """

    name: str
    index: int
    train: Sequence[Sample]
    eval: Sequence[Sample]
    metric: Metric
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSequence:
    """The tasks in the order in which they are learnt, and the sets that are only retained.

    `retain` names what the model knows before the first task: measured and scored, never trained
    on.
    """

    tasks: tuple[Task, ...]
    retain: tuple[Task, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [task.name for task in (*self.retain, *self.tasks)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"task names must be unique, but these appear twice: {', '.join(twice)}"
            )

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]
