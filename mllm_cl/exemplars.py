"""Exemplars: the few pictures of every class that a method keeps, and how many a budget has room
for.

They are kept as places in the training set of their task, which is read again; their pixels count
as if they were stored.
C classes, D feature width, M exemplars, N pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.features import FeatureBatches
from mllm_cl.learner import ClassMethod
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.task import Sample, Task

MB = 2**20  # what MEMO's tables call a MB


def herding(features_ND: Tensor, number: int) -> Tensor:
    """The places of at most `number` features, the one to be kept longest first.

    The k-th is that of those left which brings the mean of the chosen nearest to the mean of all,
    argmin_i ‖μ − (v_i + Σ chosen) / k‖, with features of length 1; of equally near ones the first.
    In float64. Source: iCaRL, arXiv:1611.07725, algorithm 4.
    """
    unit_ND = functional.normalize(features_ND.double(), dim=-1)
    mean_D, sum_D = unit_ND.mean(0), torch.zeros_like(unit_ND[0])
    chosen: list[int] = []
    for count in range(1, min(number, len(unit_ND)) + 1):
        distance_N = (mean_D - (unit_ND + sum_D) / count).norm(dim=-1)
        distance_N[chosen] = torch.inf
        chosen.append(int(distance_N.argmin()))  # the first of several
        sum_D += unit_ND[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.int64)


def affordable(budget_mb: float, model_bytes: int, picture_bytes: int) -> int:
    """How many pictures fit beside a model into a budget, as MEMO counts (arXiv:2205.13218): a
    parameter of the encoder is 4 bytes, a picture C x H x W at the size that the model sees. Heads,
    optimizers and teachers are not counted.

    Raises ValueError for a budget below the model's own bytes.
    """
    left = int(budget_mb * MB) - model_bytes
    if left < 0:
        raise ValueError(
            f"budget_mb is {budget_mb:g}, but the encoder alone takes {model_bytes / MB:.2f} MB: "
            "raise it, or choose a smaller model"
        )
    return left // picture_bytes


def encoder_bytes(model: Classifier) -> int:
    """What MEMO counts of a model: its encoder in fp32."""
    return 4 * sum(engine.shape(one).numel() for one in model.encoder.parameters())


@dataclass(frozen=True)
class Exemplars:
    """Which pictures are kept: class after class, of each the one to be kept longest first.

    `label_M` are places in the class order, `place_M` places in the training set of the task that
    brought the class.
    """

    label_M: Tensor
    place_M: Tensor

    @classmethod
    def of(cls, memory: Memory, prefix: str) -> "Exemplars":
        """Those that were kept under `prefix`, none without any."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(*(memory.get(f"{prefix}/{key}", none) for key in ("label", "place")))

    def first(self, number: int) -> "Exemplars":
        """The first `number` of every class."""
        kept_M = self.rank_M < number
        return Exemplars(self.label_M[kept_M], self.place_M[kept_M])

    @property
    def rank_M(self) -> Tensor:
        """How many of its class come before each."""
        _, count_C = self.label_M.unique_consecutive(return_counts=True)
        return torch.cat([torch.arange(0), *map(torch.arange, count_C.tolist())])

    @classmethod
    def herded(cls, features_ND: Tensor, label_N: Tensor, number: int) -> "Exemplars":
        """At most `number` of each class of a task's features."""
        own = [(label_N == label).nonzero().flatten() for label in label_N.unique().tolist()]
        places = [own_N[herding(features_ND[own_N], number)] for own_N in own]
        place_M = torch.cat(places)
        return cls(label_N[place_M], place_M)

    def __add__(self, newer: "Exemplars") -> "Exemplars":
        """These, and those of later classes."""
        pairs = (self.label_M, newer.label_M), (self.place_M, newer.place_M)
        return Exemplars(*map(torch.cat, pairs))

    def __len__(self) -> int:
        return len(self.label_M)

    def samples(self, past: Sequence[Task]) -> list[Sequence[Sample]]:
        """The pictures, read from the training sets of the tasks from the first on.

        Raises ValueError where these are not what was chosen from.
        """
        found, first = [], 0
        for task in past:
            last = first + len(task.labels)
            own_M = (self.label_M >= first) & (self.label_M < last)
            places, labels = self.place_M[own_M].tolist(), self.label_M[own_M].tolist()
            names = [task.labels[label - first] for label in labels]
            size, targets = len(task.train), task.train.targets
            there = [task.train.names[targets[p]] if p < size else None for p in places]
            if there != names:
                raise ValueError(
                    f"the training set of {task.name} has changed since its exemplars were chosen: "
                    "put the data back as they were, or choose another output_dir"
                )
            found.append(task.train.select(places))
            first = last
        return found


@dataclass(frozen=True, kw_only=True)
class Rehearsal(ClassMethod):
    """A method that keeps exemplars of all classes, and trains on them beside each task's images.

    `memory_size` of them are shared evenly by the classes so far (2000 for CIFAR-100 and
    ImageNet-100), old lists cut to their first; `memory_per_class` are as many of every class
    instead. `budget_mb` shares out what a budget leaves beside the encoder (`affordable`).
    Its `batches` hold the features of the task's images first, then those of the exemplars that it
    trained on, in their order.
    """

    rehearsal: ClassVar[bool] = True

    memory_size: int | None = None  # 2000 where none of the three is set
    memory_per_class: int | None = None
    budget_mb: float | None = None

    def __post_init__(self) -> None:
        """Refuse two sizes at once, and none; a subclass with checks calls this too."""
        sizes = {key: vars(self)[key] for key in ("memory_size", "memory_per_class", "budget_mb")}
        given = {key: value for key, value in sizes.items() if value is not None}
        if len(given) > 1:
            named = " and ".join(f"{key} {value}" for key, value in given.items())
            others = "the other" if len(given) == 2 else "the others"
            problem = f"found {named}, which are ways to say one thing: set {others} to null"
            raise ValueError(f"{problem}, also where it is a default")
        for key, value in given.items():
            if value <= 0:
                raise ValueError(f"{key} must be above 0, found {value}")

    def quota(self, model: Classifier, classes: int) -> int:
        """How many exemplars of each of `classes` there is room for. ValueError for none."""
        if self.memory_per_class is not None:
            return self.memory_per_class
        total = self.memory_size or 2000
        if self.budget_mb is not None:
            total = affordable(self.budget_mb, encoder_bytes(model), model.picture_bytes)
        if total < classes:
            raise ValueError(
                f"there is room for {total} exemplars, but {classes} classes need one each: raise "
                f"{'memory_size' if self.budget_mb is None else 'budget_mb'}"
            )
        return total // classes

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """As ever; and there has to be room for the classes of the task."""
        super().before_task(model, task, memory)
        self.quota(model, max(self.seen(memory) + len(task.labels), 1))

    def exemplars(self, memory: Memory) -> Exemplars:
        """Those that are kept."""
        return Exemplars.of(memory, f"{self.name}/exemplars")

    def train_set(self, task: Task, memory: Memory, past: Sequence[Task]) -> Sequence[Sample]:
        """The task's images, and the exemplars of all earlier classes."""
        return task.train.joined(*self.exemplars(memory).samples(past))

    def keep(
        self, model: Classifier, task: Task, memory: Memory, batches: FeatureBatches
    ) -> tuple[Exemplars, Tensor]:
        """Choose exemplars of the task's classes, let go of what there is no room for, and return
        what is kept with its features (M, D), as the model makes them now. Collective.
        """
        features_ND, label_N = batches.whole()
        number = self.quota(model, self.seen(memory) + len(task.labels))
        size, old = len(task.train), self.exemplars(memory)
        new = Exemplars.herded(features_ND[:size], label_N[:size], number)
        kept = old.first(number) + new
        taken = torch.tensor(len(kept) * model.picture_bytes)
        tensors = {"label": kept.label_M, "place": kept.place_M, "bytes": taken}
        memory.put(f"{self.name}/exemplars", tensors)
        old_MD = features_ND[size:][old.rank_M < number]
        return kept, torch.cat([old_MD, features_ND[new.place_M]])

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The exemplars, if no later stage brings more classes than the first, and what else is."""
        classes = model.head.number * num_tasks
        number = self.quota(model, classes) * classes
        own = number * (model.picture_bytes + 16) + 8
        return own + super().forecast_bytes(model, num_tasks)

    def num_kept(self, memory: Memory) -> int:
        """How many exemplars there are."""
        return len(self.exemplars(memory))

    def kept_bytes(self, memory: Memory) -> int:
        """The memory, and the exemplars' pixels in bytes at the size that the model sees."""
        taken = memory.get(f"{self.name}/exemplars/bytes", torch.tensor(0))
        return memory.num_bytes + int(taken)


@dataclass(frozen=True, kw_only=True)
class OptionalRehearsal(Rehearsal):
    """A method that may do without: `memory_per_class` 0 keeps no exemplar."""

    def __post_init__(self) -> None:
        """No exemplars are a choice, too; but none beside some is not."""
        for key in ("memory_size", "budget_mb"):
            if not self.rehearses and vars(self)[key] is not None:
                raise ValueError(
                    f"found {key} {vars(self)[key]} and memory_per_class 0, which keeps none: set "
                    "'memory_per_class: null'"
                )
        if self.rehearses:
            super().__post_init__()

    @property
    def told_apart(self) -> str:
        return "all" if self.rehearses else "own"

    @property
    def rehearses(self) -> bool:
        """Whether it keeps any."""
        return self.memory_per_class != 0

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The exemplars of the new classes."""
        self.keep(model, task, memory, batches)
        super().after_task(model, task, memory, batches, reduce)
