"""The model as it comes, never trained: the lower reference of every table."""

from collections.abc import Sequence
from dataclasses import dataclass

from mllm_cl.memory import Memory
from mllm_cl.method import Method
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Method):
    """No training at all; every task is scored with the incoming model."""

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """Nothing to train on."""
        return None
