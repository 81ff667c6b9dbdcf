"""PROOF: projections that expand with the tasks, and cross-modal fusion, on a frozen CLIP.

Source: Zhou et al., "Learning without Forgetting for Vision-Language Models", arXiv:2305.19270
(TPAMI 2025), sections 4.1 to 4.3, algorithm 1, and its released code.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl.exemplars import OptionalRehearsal
from mllm_cl.learner import Expanding
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.fusion import Fusion
from mllm_cl.model.heads import class_sums
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class Proof(Expanding, OptionalRehearsal):
    """Both encoders stay as they are; a task adds a linear projection for images, one for texts and
    `context` prompts, and trains them with the attention that all tasks share (`model.fusion`):

        L = CE(s cos(P(z), P(w))) + CE(s cos(z̃, p̃)) + CE(s cos(z̃, w̃))     eq. 3, 5, 6, 7

    over all classes so far, on the task's images and the exemplars. The answer is the sum of the
    three softmaxes (eq. 8). Class means p are those of raw features (mode released: of unit ones),
    taken before the class is learnt; names are read by the first prompt in training, by all at
    test. Old projections stay frozen, and those of a side are together one matrix.

    mode released, the code behind the tables, differs: old projections of texts go on training, the
    first loss is a contrast within the batch, the other two have neither cosine nor scale, and the
    fused context is a mean over the images that are asked together, so that an answer depends on
    them; with `emulate_legacy_decay` old projections of images and old prompts fade. Of both modes,
    but not in the paper: layer norm after the residual, and `dropout`.
    `residual` adds the features themselves to each projection, which starts at zero, so that what
    the model knows by name survives (the paper has such a variant; its form here is ours).

    Defaults: 20 exemplars of each class, 3 prompts. Trained with SGD (momentum 0.9, weight decay
    0.05, lr 1e-3, cosine, batch 64) for 10 epochs, 5 on CIFAR-100 (released configurations).
    """

    reads: ClassVar[bool] = True

    memory_per_class: int | None = 20
    context: int = 3
    dropout: float = 0.1
    residual: bool = False

    def __post_init__(self) -> None:
        """As for exemplars, and for what fades."""
        super().__post_init__()
        self.check_decay()

    @property
    def told_apart(self) -> str:
        return "all"

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """A projection of each side and a context for every task so far; the newest train."""
        super().before_task(model, task, memory)
        if self.mode == "released":
            warnings.warn(
                "proof with 'mode: released' answers an image by those that are asked beside it, "
                "too: take it to compare with published tables alone",
                stacklevel=2,
            )
        model.head = Fusion(
            model.encoder.width,
            log_scale=model.encoder.backbone.logit_scale,
            context=self.context,
            dropout=self.dropout,
            paper=self.mode == "paper",
            residual=self.residual,
            fades=self.emulate_legacy_decay,
            seed=self.seed,
        )
        self.expand(model, task)

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """The means and the exemplars."""
        means = 4 * model.head.number * num_tasks * model.encoder.width
        return means + super().forecast_bytes(model, num_tasks)

    def start_task(
        self,
        model: Classifier,
        task: Task,
        memory: Memory,
        batches: Batches,
        reduce: Reduce,
    ) -> None:
        """The means of the new classes, by all their images and no exemplar."""
        features_ND, label_N = (every[: len(task.train)] for every in batches.whole())
        if self.mode == "released":
            features_ND = functional.normalize(features_ND, dim=-1)
        first = len(task.earlier)
        sum_CD, count_C = class_sums(features_ND, label_N - first, len(task.labels))
        known_CD = memory.get(f"{self.name}/means", sum_CD[:0].float())
        mean_CD = (sum_CD / count_C[:, None]).float()
        memory[f"{self.name}/means"] = torch.cat([known_CD[:first], mean_CD])

    def before_forward(self, model: Classifier, inputs: dict[str, Tensor], memory: Memory) -> None:
        """Names and means, once: a run that goes on from a checkpoint comes here first."""
        self._inform(model, memory)

    def after_task(
        self,
        model: Classifier,
        task: Task,
        memory: Memory,
        batches: Batches,
        reduce: Reduce,
    ) -> None:
        """The exemplars of the new classes."""
        self.recall(model, task, memory)
        super().after_task(model, task, memory, batches, reduce)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """Class means, and what the text tower says of names."""
        self._inform(model, memory)

    def _inform(self, model: Classifier, memory: Memory) -> None:
        head = model.head
        if len(head.mean_CD) < head.number:
            head.inform(memory[f"{self.name}/means"], model.prompts(head.names))
