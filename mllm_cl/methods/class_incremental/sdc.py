"""SDC: the means of old classes are moved by as much as the features of new images drifted nearby.

Source: Yu et al., "Semantic Drift Compensation for Class-Incremental Learning", arXiv:2004.00440,
and its released code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl.learner import WholeLearner
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.heads import NearestMean, class_sums
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class SDC(WholeLearner):
    """The answer is argmin_c ‖z - μ_c‖ with z = φ/‖φ‖; of a new class μ_c is the mean of z over its
    training images, and after every later stage

        μ_c += Σ_i α_i (z_i - z_i') / Σ_i α_i,    α_i = exp(-‖z_i' - μ_c‖² / 2σ²),

    over the stage's images, z' from before the stage. No image of the past is seen.

    The paper trains embeddings by triplets; as a row of APER's table (arXiv:2303.07338) the encoder
    trains as `finetune` does. Sigma 0.3 is the released demo's.
    """

    sigma: float = 0.3

    def __post_init__(self) -> None:
        """Refuse a width of nothing."""
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, found {self.sigma}")

    def head(self, width: int, number: int) -> NearestMean:
        """Linear as it trains, then the nearest mean."""
        return NearestMean(width, number, seed=self.seed)

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """What the incoming model makes of the task's images."""
        if self.seen(memory):
            memory[f"{self.name}/before"] = _unit(batches.whole()[0])

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The means of all classes, old ones moved."""
        features_ND, label_N = batches.whole()
        unit_ND, old = _unit(features_ND), self.seen(memory)
        sum_CD, count_C = class_sums(unit_ND, label_N - old, len(task.labels))
        mean_CD = sum_CD / count_C[:, None]
        if old:
            before_ND, known_CD = (memory.pop(f"{self.name}/{key}") for key in ("before", "means"))
            known_CD = known_CD + compensation(before_ND, unit_ND, known_CD, self.sigma)
            mean_CD = torch.cat([known_CD, mean_CD])
        memory[f"{self.name}/means"] = mean_CD
        super().after_task(model, task, memory, batches, reduce)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The means."""
        model.head.mean_CD = memory[f"{self.name}/means"]

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The means, if no later stage brings more classes than the first."""
        return 8 + 8 * model.head.number * num_tasks * model.encoder.width


def compensation(before_ND: Tensor, after_ND: Tensor, mean_CD: Tensor, sigma: float) -> Tensor:
    """How far each mean has drifted (C, D), by how far the features around it have."""
    distance_CN = torch.cdist(mean_CD, before_ND, compute_mode="donot_use_mm_for_euclid_dist")
    # As a softmax, since all of a far mean's weights would underflow.
    share_CN = (-distance_CN.square() / (2 * sigma**2)).softmax(dim=1)
    return share_CN @ (after_ND - before_ND)


def _unit(features_ND: Tensor) -> Tensor:
    return functional.normalize(features_ND.double(), dim=-1)
