"""SLCA: the encoder learns slowly, and the head is aligned afterwards on features that Gaussians of
all classes give.

Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
Pre-trained Model", arXiv:2303.05118, and its released code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mllm_cl import engine
from mllm_cl.learner import WholeLearner
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.alignment import Aligned, Alignment, gaussian
from mllm_cl.model.classifier import Classifier
from mllm_cl.task import Task

ALIGNED = "weight", "bias"


@dataclass(frozen=True, kw_only=True)
class SLCA(WholeLearner):
    """Local cross entropy with the recipe's learning rate for the head and `slow` times it for the
    encoder. Of each class the mean and covariance + 1e-4 I of its training images' features are
    kept (fp32, not moved later). After every stage but the first the head is trained on
    `per_class` features of each, drawn anew in each of `align_epochs`; with logits l it is

        cross entropy of l / (temperature · mean over tasks of ‖l_task‖).

    The aligned head answers; the next stage goes on with the one before it, as released.
    `mode: released` draws around (0.9 + 0.1 t_c / t) μ_c, class c being of the t_c-th of t tasks;
    the paper around μ_c. Made for SGD: AdamW moves the encoder by `slow` of a rate so far that what
    is kept of old classes no longer fits (benchmarks/RESULTS.md). Defaults: the released
    configuration for CIFAR-100 (0.01 with SGD, weight decay 5e-4, 20 epochs; LAMDA-PILOT aligns for
    3 epochs).
    """

    mode: Literal["paper", "released"] = "released"
    slow: float = 0.01
    align_epochs: int = 5
    align_rate: float = 0.01
    align_weight_decay: float = 5e-4
    per_class: int = 256
    temperature: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what would leave out a part without a word."""
        for name in ("slow", "align_epochs", "align_rate", "per_class", "temperature"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name} must be positive, found {vars(self)[name]}")

    @property
    def rates(self) -> Mapping[str, float]:
        return {"encoder.": self.slow}

    def head(self, width: int, number: int) -> Aligned:
        """Linear, with room for what answers in its place."""
        return Aligned(width, number, seed=self.seed)

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The Gaussians of the task's classes, and the head aligned to all."""
        features_ND, label_N = batches.whole()
        first = self.seen(memory)
        found = [
            gaussian(features_ND[label_N == label])
            for label in range(first, first + len(task.labels))
        ]
        known = memory.under(self.name)
        for name, own in zip(("mean", "cov"), zip(*found, strict=True), strict=True):
            rows = torch.stack(own).float()
            memory[f"{self.name}/{name}"] = torch.cat([known.get(name, rows[:0]), rows])
        sizes = torch.tensor([len(task.labels)])
        memory[f"{self.name}/sizes"] = torch.cat([known.get("sizes", sizes[:0]), sizes])
        super().after_task(model, task, memory, batches, reduce)
        if first:
            self._align(model.head, memory)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The aligned head, which there is from the second task on."""
        known = memory.under(f"{self.name}/aligned")
        model.head.aligned = tuple(known[name] for name in ALIGNED) if known else None

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """Gaussians and the aligned head, if no later stage brings more classes than the first."""
        classes, width = model.head.number * num_tasks, model.encoder.width
        return 4 * classes * width * (width + 1) + 8 * (classes * (width + 1) + num_tasks + 1)

    def _align(self, head: Aligned, memory: Memory) -> None:
        known = memory.under(self.name)
        sizes, mean_CD = known["sizes"], known["mean"].double()
        if self.mode == "released":
            share_T = torch.arange(1, len(sizes) + 1).double() / len(sizes)
            mean_CD = mean_CD * (0.9 + 0.1 * share_T.repeat_interleave(sizes))[:, None]
        alignment = Alignment(
            epochs=self.align_epochs,
            rate=self.align_rate,
            number=self.per_class,
            temperature=self.temperature,
            weight_decay=self.align_weight_decay,
            seed=self.seed,
        )
        own = engine.full(head.weight), engine.full(head.bias)
        aligned = alignment.of(own, (mean_CD, known["cov"]), sizes.tolist())
        for name, one in zip(ALIGNED, aligned, strict=True):
            memory[f"{self.name}/aligned/{name}"] = one
