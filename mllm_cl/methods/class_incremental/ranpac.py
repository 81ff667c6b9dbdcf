"""RanPAC: a ridge classifier on random features of a model that was adapted to the first stage.

Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual
Learning", arXiv:2307.02251, algorithm 1, and LAMDA-PILOT's code.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mllm_cl.learner import FirstStageLearner
from mllm_cl.memory import Memory
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.ridge import Ridge
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class RanPAC(FirstStageLearner):
    """h = relu(f R), f the feature of the adapted model alone, R ~ N(0, 1) of `dim` columns and
    fixed; G = Σ h hᵀ and Q = Σ h yᵀ over all images so far; the answer is argmax_c W_c h with
    W = (G + λ I)⁻¹ Q. APER compares means; here what classes have in common is taken out first.

    λ is chosen for each task by squared error on a fifth of its images, learnt from at most 4,000
    of the others. `mode: released` is
    LAMDA-PILOT's head, cos(h, W_c); the paper's is the product. `adaptation: none` leaves the first
    stage's training out (the paper's "no phase 1"). Defaults: M = 10000 of the paper, the rest
    APER's. R is drawn again from the seed; the memory holds the upper triangle of G and Q in
    float64, 4 M (M + 1) + 8 M C bytes: 400 MB at M = 10000, 100 MB at 5000. In fp32 it would be
    half, but rounding G moves W: by 1e-4 to 3e-4 of its norm on scikit-learn's digits.
    """

    adaptation: Literal["adapter", "ssf", "vpt_shallow", "vpt_deep", "finetune", "bn", "none"] = (
        "adapter"
    )
    mode: Literal["paper", "released"] = "paper"
    dim: int = 10_000

    def settle(self, model: Classifier, memory: Memory) -> None:
        """The adapted features, and the sums of the past."""
        known = memory.under(self.name)
        model.head = Ridge(
            model.encoder.width,
            dim=self.dim,
            normalised=self.mode == "released",
            seed=self.seed,
        )
        if known:
            model.head.restore(known)

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """G's triangle and Q, if no later stage brings more classes than the first."""
        triangle = 4 * self.dim * (self.dim + 1)
        return triangle + 8 * self.dim * model.head.number * num_tasks + 8 * 9

    @property
    def told_apart(self) -> str:
        return "" if self.adaptation == "none" else super().told_apart

    def _trains(self, task: Task) -> bool:
        return self.adaptation != "none" and super()._trains(task)

    def _attached(self, encoder: Encoder) -> dict[str, nn.Parameter]:
        return {} if self.adaptation == "none" else super()._attached(encoder)
