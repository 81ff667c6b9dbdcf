"""EASE: an adapter of its own for every task, and the prototypes of all classes under all of them.

Source: Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental
Learning", arXiv:2403.12030, and LAMDA-PILOT's code.
"""

from dataclasses import dataclass
from typing import Literal

from mllm_cl.learner import ClassMethod
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.heads import Cosine
from mllm_cl.model.subspaces import Subspaces
from mllm_cl.model.surgery import only_train
from mllm_cl.model.vision import attach_adapters, show
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class EASE(ClassMethod):
    """Every task trains a new adapter in the frozen model, with a cosine head of its own classes
    that is thrown away. Class c of task i is compared in all subspaces φ_j:

        argmax_c Σ_j w_ij cos(φ_j(x), P[c, j]),  w_ii = 1, else α

    P[c, j] is a mean for j ≤ i; no image of c is left for later adapters, so there it is made of
    newer classes by their likeness to c (`model.subspaces`). APER adapts once. An answer takes as
    many passes as there were tasks, through one copy of the frozen weights; the state holds the
    adapters of all tasks, 4.8 MB each for a ViT-B/16.

    `mode: released` divides α by the number of earlier tasks; the paper's α stays. Defaults: the
    released configurations (rank 64 where the paper has 16, α = 0.1, sigma 1 and learnt).
    """

    rank: int = 64
    dropout: float = 0.1  # inside the adapter
    sigma: float = 1.0
    alpha: float = 0.1
    mode: Literal["paper", "released"] = "paper"

    @property
    def told_apart(self) -> str:
        return "own"

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The adapters of all tasks so far; the newest acts and trains, with a cosine head."""
        if task.index == 0:
            only_train(model, [])
            return
        for stage in range(1, task.index + 1):
            trained = attach_adapters(
                model.encoder,
                rank=self.rank,
                dropout=self.dropout,
                seed=self.seed + stage,
                name=_adapter(stage),
            )
        newest = _adapter(task.index)
        show(model.encoder, {newest: (newest,)})
        model.head = Cosine(
            model.encoder.width, self.seen(memory), sigma=self.sigma, seed=self.seed
        )
        model.head.grow(len(task.labels))
        model.local = True
        only_train(model, [*trained.values(), *model.head.parameters()])

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The prototypes of the task's classes under all adapters, in the place of what trained."""
        self.recall(model, task, memory)
        learnt = model.head.learn(len(task.labels), batches)
        super().after_task(model, task, memory, batches, reduce)
        for name, tensor in learnt.items():
            memory[f"{self.name}/{name}"] = tensor

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """All adapters side by side, and the prototypes that are known."""
        adapters = [_adapter(stage) for stage in range(1, task.index + 1)]
        show(model.encoder, {name: (name,) for name in adapters})
        earlier = task.index - 1
        divided = self.mode == "released" and earlier
        model.head = Subspaces(
            model.encoder.width, other=self.alpha / earlier if divided else self.alpha
        )
        model.head.restore(memory.under(self.name))

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The sums of every class up to its task's subspace, and counts, if no later stage brings
        more classes than the first.
        """
        classes, subspaces = model.head.number, num_tasks * (num_tasks + 1) // 2
        return 8 * classes * (model.encoder.width * subspaces + num_tasks) + 8


def _adapter(stage: int) -> str:
    """What the adapters of a task are called."""
    return f"adapter_{stage}"
