"""What methods for classes that come in stages have in common."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce
from mllm_cl.model.batch_norm import adapt_statistics, attach_statistics
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Cosine, Linear
from mllm_cl.model.surgery import only_train
from mllm_cl.model.teacher import keep_copy
from mllm_cl.model.vision import attach_adapters, attach_copy, attach_prompts, attach_ssf
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class ClassMethod(Method):
    """A method that learns classes: its model is a `Classifier`, its `batches` are the
    `FeatureBatches` of all training images of the task, as the model encodes them when asked.

    The head is made anew for each task, with the rows of the classes that were there before.
    """

    setting: ClassVar[str] = "class_incremental"
    engines: ClassVar[tuple[str, ...]] = ("single", "ddp", "zero1", "zero2", "fsdp2")

    seed: int = 0

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The number of classes."""
        return 8

    def seen(self, memory: Memory) -> int:
        """How many classes came before this task."""
        return int(memory.get(f"{self.name}/classes", torch.tensor(0)))

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Count the task's classes."""
        memory[f"{self.name}/classes"] = torch.tensor(self.seen(memory) + len(task.labels))

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """Have a model that was prepared for the task, and whose weights are put back after this,
        answer as after the task, by what the memory holds since. Collective.
        """


@dataclass(frozen=True, kw_only=True)
class LinearLearner(ClassMethod):
    """A method that trains a linear head, and what `attach` puts into or chooses of the encoder.

    With `local` the cross entropy of a task leaves the classes of earlier tasks out ("local CE"),
    so that their rows are not pushed down by images that are none of theirs.
    """

    local: bool = True

    @property
    def told_apart(self) -> str:
        return "own" if self.local else "all"

    def head(self, width: int, number: int) -> Linear:
        """A head of the classes that came before."""
        return Linear(width, number, seed=self.seed)

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """The parameters of the encoder that train, put in where they are not its own; `tasks`
        counts those so far, with the one to come.
        """
        return ()

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The head with rows for the new classes; it trains, and what was attached."""
        if task.index == 0:
            only_train(model, [])
            return
        trained = self.attach(model.encoder, task.index)
        model.head = self.head(model.encoder.width, self.seen(memory))
        model.head.grow(len(task.labels))
        model.local = self.local
        only_train(model, [*trained, *model.head.parameters()])


@dataclass(frozen=True, kw_only=True)
class FirstStageLearner(ClassMethod):
    """A method that adapts the frozen model to the first stage, with a cosine head that is thrown
    away; afterwards nothing trains, and what answers is measured.

    `adaptation` is what is put in: AdaptFormer's bottleneck of `rank`, SSF, or `prompts` prompts
    before the first block or every block (VPT); `finetune` trains a copy of the whole encoder
    beside the frozen one, so that all weights are in memory and in the state twice; `bn` trains
    nothing, and lets the batch statistics of a ResNet follow the images, `passes` times in batches
    of 128. Defaults: APER's released configurations (rank 64, 5 prompts, sigma 1 and learnt, 10
    passes).
    """

    engines: ClassVar[tuple[str, ...]] = Method.engines

    adaptation: Literal["adapter", "ssf", "vpt_shallow", "vpt_deep", "finetune", "bn"] = "adapter"
    rank: int = 64
    dropout: float = 0.1  # inside the adapter
    prompts: int = 5
    sigma: float = 1.0
    passes: int = 10

    @property
    def told_apart(self) -> str:
        return "all" if self.adaptation != "bn" else ""

    def settle(self, model: Classifier, memory: Memory) -> None:
        """Put in what answers from here on: which features, and the head with what is known."""
        raise NotImplementedError

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """Stage 1: the adaptation and a cosine head train. Later nothing does."""
        if task.index == 0:
            only_train(model, [])
            return
        trained = self._attached(model.encoder)
        if self._trains(task):
            model.head = Cosine(
                model.encoder.width, len(task.labels), sigma=self.sigma, seed=self.seed
            )
            only_train(model, [*trained.values(), *model.head.parameters()])
            return
        if not self._follows(task):
            self.settle(model, memory)
        only_train(model, [])

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """The images of the first stage."""
        return task.train if self._trains(task) else None

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """What the head learns of the task's classes, without a gradient."""
        if self._follows(task):
            pictures = batches.pictures(128, self.passes, self.seed)
            adapt_statistics(model, model.encoder, pictures)
        if self._trains(task) or self._follows(task):
            self.settle(model, memory)
        memory.put(self.name, model.head.learn(len(task.labels), batches))

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """What answers, with all that is known."""
        self.settle(model, memory)

    def _trains(self, task: Task) -> bool:
        return task.index == 1 and self.adaptation != "bn"

    def _follows(self, task: Task) -> bool:
        return task.index == 1 and self.adaptation == "bn"

    def _attached(self, encoder: Encoder) -> dict[str, nn.Parameter]:
        if self.adaptation == "adapter":
            return attach_adapters(encoder, rank=self.rank, dropout=self.dropout, seed=self.seed)
        if self.adaptation == "ssf":
            return attach_ssf(encoder, seed=self.seed)
        if self.adaptation == "finetune":
            return attach_copy(encoder)
        if self.adaptation == "bn":
            return attach_statistics(encoder)
        deep = self.adaptation == "vpt_deep"
        return attach_prompts(encoder, number=self.prompts, deep=deep, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class WholeLearner(LinearLearner):
    """A method that trains the whole encoder beside its linear head."""

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """All that features of pictures depend on; the running statistics of a ResNet stay."""
        return list(encoder.sight.values())


@dataclass(frozen=True, kw_only=True)
class Distilling(WholeLearner):
    """A method that keeps a copy of the model before each task, whose logits of old classes, for
    the batch at hand, it finds in `outputs.before`.
    """

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """As above; and from the second task on the copy."""
        super().before_task(model, task, memory)
        if task.index and self.seen(memory):
            keep_copy(model).head.train()  # it answers as it does while it learns

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        """What keeps answers about old classes as they were, from the second stage on."""
        if outputs.before is None:
            return None
        before_BC = outputs.before
        return self.distilled(before_BC, outputs.logits[:, : before_BC.shape[1]])

    def distilled(self, before_BC: Tensor, now_BC: Tensor) -> Tensor:
        """The term for the logits of old classes, by the copy and by the model."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Expanding(ClassMethod):
    """A method that adds weights with every task and freezes the earlier ones.

    `emulate_legacy_decay` lets them fade, as they did where published tables come from: torch 1
    left gradients of zero on what was frozen, and the SGD of mode released, which is given all
    parameters, shrinks what has any gradient by its weight decay. It is there to compare with such
    tables, and warns.
    """

    mode: Literal["paper", "released"] = "paper"
    emulate_legacy_decay: bool = False

    @property
    def legacy_decay(self) -> bool:
        return self.emulate_legacy_decay

    def check_decay(self) -> None:
        """Warn of weights that fade; called by `__post_init__`. ValueError in mode paper."""
        if not self.emulate_legacy_decay:
            return
        if self.mode == "paper":
            raise ValueError(
                "emulate_legacy_decay is what the released code did under torch 1, found it with "
                "mode 'paper': set 'mode: released', or leave it out"
            )
        warnings.warn(
            f"{self.name} with 'emulate_legacy_decay: true' lets weight decay shrink what earlier "
            "tasks learnt: take it to compare with published tables alone",
            stacklevel=4,
        )

    def expand(self, model: Classifier, task: Task) -> None:
        """The head gets weights for every task so far and places for all their classes; the newest
        weights train, and those that fade.
        """
        head = model.head
        for _ in range(task.index):
            head.expand()
        head.hold(len(task.earlier), len(task.labels))
        head.names = (*task.earlier, *task.labels)
        only_train(model, [*head.newest(), *head.fading()] if task.index else [])


@dataclass(frozen=True, kw_only=True)
class KeyedLearner(LinearLearner):
    """A method whose pictures choose prompts by keys, which `pull` draws to the pictures: the loss
    has minus `pull` times the sum of cosines between a picture's query and the keys it chose.

    `batchwise` lets all pictures of a batch vote for prompts that they share, as the released code
    does. Images of one task come together when it is tested, so that the vote knows the task and
    scores are too high: it is there to compare with such scores, and warns.
    """

    pull: float = 0.1  # the released configurations
    batchwise: bool = False

    def __post_init__(self) -> None:
        """Warn of what makes an answer depend on other pictures. ValueError for keys at rest."""
        if self.pull <= 0:
            raise ValueError(
                f"found pull {self.pull}, but nothing else trains the keys: take a number above 0"
            )
        if self.batchwise:
            warnings.warn(
                f"{self.name} with 'batchwise: true' lets the pictures of a batch vote for its "
                "prompts: answers depend on batch size and order, and as tests come task by task "
                "they know the task. Leave it out unless such scores are what you compare with.",
                stacklevel=3,
            )

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor:
        """Draws the chosen keys to the pictures that chose them."""
        return self.pull * outputs.owed
