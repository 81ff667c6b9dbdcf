"""The model as it comes, never trained: the lower reference of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mllm_cl.memory import Memory
from mllm_cl.method import Tuned
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Tuned):
    """No training at all; every task is scored with the incoming model.

    It takes the settings of the others, so that one recipe serves all, and uses none.
    """

    unlearns: ClassVar[bool] = True

    train_router: bool = False

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Freeze everything."""
        only_train(model, [])

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """Nothing to train on."""
        return None
