"""SimpleCIL: the classes' mean features of a frozen pre-trained model, compared by cosine.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models",
arXiv:2303.07338, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce
from mllm_cl.model.heads import Prototype
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class SimpleCIL(Method):
    """No training: the weight of class c is the mean of its training images' features, as they are
    (CLS after the last norm, test preprocessing); the answer is argmax_c cos(f(x), w_c).

    Sums and counts are added up in float64, so the head does not depend on batches, processes or
    the order of tasks.
    """

    setting: ClassVar[str] = "class_incremental"

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """A head with the prototypes of the past, and everything frozen."""
        known = memory.under(self.name)
        model.head = Prototype(model.encoder.width, len(known.get("count", ())))
        if known:
            model.head.restore(known["sum"], known["count"])
        only_train(model, [])

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """Nothing to train on."""
        return None

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The prototypes of the task's classes."""
        memory.put(self.name, model.head.learn(len(task.labels), batches))
