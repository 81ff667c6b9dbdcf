"""iCaRL (arXiv:1611.07725): exemplars by herding, distillation on them and on what is new, and the
nearest mean of exemplars as the answer.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

from mllm_cl.drift.distil import divergence, even_share
from mllm_cl.exemplars import Rehearsal
from mllm_cl.learner import Distilling
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier, binary_cross_entropy
from mllm_cl.model.heads import Linear, NearestMean, class_sums
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class ICaRL(Rehearsal, Distilling):
    """mode paper, eq. 1: every class is a sigmoid g_c with binary cross entropy; its target is the
    label for new classes, and what g_c was before the stage for old ones.
    mode released (PyCIL, LAMDA-PILOT): cross entropy over all classes + KL(p_before || p_now) of
    old classes at temperature 2, without T^2.

    The answer is argmin_c ‖φ/‖φ‖ − μ_c‖, μ_c the normalised mean of the normalised features of the
    class's exemplars (`answer: linear`: the head's largest logit). Losses are means over images, of
    exemplars and new ones alike; eq. 1 sums over classes. The default is released, since tables
    that cite iCaRL come from it.
    """

    local: bool = False  # exemplars are of old classes
    mode: Literal["paper", "released"] = "released"
    answer: Literal["nearest_mean", "linear"] = "nearest_mean"
    temperature: float = 2.0  # released

    def __post_init__(self) -> None:
        """Refuse what would turn the term around, and what exemplars cannot be trained with."""
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, found {self.temperature}")
        if self.local:
            raise ValueError("found local true, but icarl trains on old classes, too: leave it out")

    @property
    def told_apart(self) -> str:
        return "" if self.mode == "paper" else "all"

    def head(self, width: int, number: int) -> Linear:
        """Linear; what it answers with is the nearest mean unless settings say otherwise."""
        kind = NearestMean if self.answer == "nearest_mean" else Linear
        return kind(width, number, seed=self.seed)

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """All of the encoder and the head train, by the criterion of the mode."""
        super().before_task(model, task, memory)
        if self.mode == "paper":
            # Of new classes alone: what old ones are to answer is in `loss`.
            model.criterion, model.local = binary_cross_entropy, True

    def distilled(self, before_BC: Tensor, now_BC: Tensor) -> Tensor:
        """The part whose targets are former answers."""
        if self.mode == "paper":
            total = functional.binary_cross_entropy_with_logits(
                now_BC, before_BC.sigmoid(), reduction="sum"
            )
            return total / len(now_BC)
        return divergence(before_BC, now_BC, even_share(before_BC), temperature=self.temperature)

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The exemplars, and the means of all classes, with the encoder as it is now."""
        kept, features_MD = self.keep(model, task, memory, batches)
        super().after_task(model, task, memory, batches, reduce)
        if self.answer == "nearest_mean":
            unit_MD = functional.normalize(features_MD.double(), dim=-1)
            sum_CD, _ = class_sums(unit_MD, kept.label_M, self.seen(memory))
            memory[f"{self.name}/means"] = functional.normalize(sum_CD, dim=-1)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The means, where they answer."""
        if self.answer == "nearest_mean":
            model.head.mean_CD = memory[f"{self.name}/means"]

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The exemplars and the means."""
        means = 8 * model.head.number * num_tasks * model.encoder.width
        return super().forecast_bytes(model, num_tasks) + means
