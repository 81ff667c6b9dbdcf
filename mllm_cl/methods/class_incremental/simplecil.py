"""SimpleCIL: the classes' mean features of a frozen pre-trained model, compared by cosine.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models",
arXiv:2303.07338, section 4.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mllm_cl.learner import ClassMethod
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce, Untrained
from mllm_cl.model.heads import Prototype
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class SimpleCIL(Untrained, ClassMethod):
    """No training: the weight of class c is the mean of its training images' features, as they are
    (CLS after the last norm, test preprocessing); the answer is argmax_c cos(f(x), w_c).

    Sums and counts are added up in float64, so the head does not depend on batches, processes or
    the order of tasks.
    """

    engines: ClassVar[tuple[str, ...]] = Method.engines

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        """Sums and counts, if no later stage brings more classes than the first."""
        return 8 * model.head.number * num_tasks * (model.encoder.width + 1)

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """A head with the prototypes of the past, and everything frozen."""
        self.recall(model, task, memory)
        super().before_task(model, task, memory)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The prototypes of the task's classes."""
        memory.put(self.name, model.head.learn(len(task.labels), batches))

    def recall(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """All prototypes that are known."""
        known = memory.under(self.name)
        model.head = Prototype(model.encoder.width, len(known.get("count", ())))
        if known:
            model.head.restore(known["sum"], known["count"])
