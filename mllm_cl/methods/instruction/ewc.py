"""Elastic weight consolidation (arXiv:1612.00796): a weight is held by a spring as stiff as its
Fisher information on earlier tasks. Unlike `same` it looks at single weights, not at directions.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Displaced, Reduce
from mllm_cl.model.fisher import squared_gradients
from mllm_cl.model.penalty import due, forgive, penalise
from mllm_cl.model.surgery import Guard, guards
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class EWC(Displaced):
    """L + (strength / 2) sum_j F_j (theta_j - theta*_j)^2, theta* the weights of the last task.

    F = sum over past tasks of the mean squared gradient of one sample's loss, the mean over its
    answer tokens: the empirical Fisher, per sample, from `fisher_samples` samples of the finished
    task. One spring to the last weights stands for one to each task's, as the recursion of the
    posterior has it (arXiv:1712.03847). `decay` below 1 forgets: F <- decay F + F_t (online EWC,
    arXiv:1805.06370). A sample is measured without activation checkpointing.
    """

    calibration_batch: ClassVar[int | None] = 1

    strength: float = 5000.0  # Prism's (arXiv:2605.26110); TRACE has 400
    decay: float = 1.0
    fisher_samples: int = 256  # ours

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength <= 0 or self.fisher_samples < 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"found strength {self.strength}, decay {self.decay} and fisher_samples "
                f"{self.fisher_samples}; expected a positive strength, a decay in [0, 1] and at "
                "least one sample."
            )

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        return 8 + sum(4 * one.displacement.numel() for one in guards(model).values())

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Tie every weight that trains to where the last task left it."""
        super().before_task(model, task, memory)
        fisher, installed = memory.under("ewc/fisher"), guards(model)
        if fisher and fisher.keys() != installed.keys():
            differ = sorted(fisher.keys() ^ installed.keys())
            raise ValueError(
                f"the memory was measured at other weights than those that train ({differ[0]} is "
                "the first that differs). Measure again with the settings of this run."
            )
        for path, value in fisher.items():
            one = installed[path]
            root = (0.5 * self.strength * value).sqrt().to(one.displacement.device)
            penalise(one, partial(_spring, one, root))

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        return due(model)

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Add the task's Fisher information to that of all tasks before it.

        Raises ValueError, on all ranks alike, where it is not finite.
        """
        super().after_task(model, task, memory, batches, reduce)
        forgive(model)
        share = -(-self.fisher_samples // engine.world_size())
        total, number = squared_gradients(model, islice(batches, share))
        number = reduce(torch.tensor(float(number)))
        for path in sorted(total):
            now = reduce(total[path]).cpu() / number
            if not now.isfinite().all():
                raise ValueError(
                    f"the Fisher information of {path} is not finite, so nothing can hold that "
                    "weight. Look for a broken sample with 'mllm-cl data check', or train it in "
                    "fp32 with a lower learning rate."
                )
            known = memory.get(f"ewc/fisher/{path}", torch.zeros_like(now))
            memory[f"ewc/fisher/{path}"] = self.decay * known + now


def _spring(one: Guard, root: Tensor) -> Tensor:
    # The step since the last task is what a guard trains; squared last, no weight is saved.
    return (root * one.delta.float()).square().sum()
