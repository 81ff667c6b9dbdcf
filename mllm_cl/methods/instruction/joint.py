"""Joint training on all tasks at once: the upper reference of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.memory import Memory
from mllm_cl.method import Tuned
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Joint(Tuned):
    """Train once, at the last task, on the union of all tasks; earlier tasks train nothing.

    A run of joint training so has one trained row, its last. With `num_train_epochs` it sees as
    many samples as a sequential run; with `max_steps` it does not.
    """

    rehearsal: ClassVar[bool] = True
    unlearns: ClassVar[bool] = True
    trains_once: ClassVar[bool] = True

    def train_set(self, task: Task, memory: Memory, past: Sequence[Task]) -> Sequence[Sample]:
        """The samples of this task and of all before it."""
        from torch.utils.data import ConcatDataset

        return ConcatDataset([*(earlier.train for earlier in past), task.train])
