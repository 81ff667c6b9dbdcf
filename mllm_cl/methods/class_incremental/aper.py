"""APER: adapt a pre-trained model to the first stage, then compare class means of both models.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models",
arXiv:2303.07338, section 4.2 (there called ADAM), and its released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce
from mllm_cl.model.heads import Cosine, Prototype
from mllm_cl.model.surgery import only_train
from mllm_cl.model.vision import attach_adapters, attach_prompts, attach_ssf, show_both
from mllm_cl.task import Sample, Task


@dataclass(frozen=True, kw_only=True)
class APER(Method):
    """Stage 1 trains an adaptation of the frozen model, with a cosine head that is thrown away;
    nothing trains afterwards. The feature is f'(x) = [f(x); f_adapted(x)], the weight of class c
    the mean of f' over its training images, the answer argmax_c cos(f'(x), w_c).

    `adaptation` is what is put in: AdaptFormer's bottleneck of `rank`, SSF, or `prompts` prompts
    before the first block or every block (VPT). The branches are joined as they come, so that the
    one of larger norm weighs more. Defaults: the released configurations (rank 64, 5 prompts,
    sigma 1 and learnt).
    """

    setting: ClassVar[str] = "class_incremental"

    adaptation: Literal["adapter", "ssf", "vpt_shallow", "vpt_deep"] = "adapter"
    rank: int = 64
    dropout: float = 0.1  # inside the adapter
    prompts: int = 5
    sigma: float = 1.0
    seed: int = 0

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """Stage 1: the adaptation and a cosine head train. Later nothing does."""
        if task.index == 0:
            only_train(model, [])
            return
        trained = self._attached(model.encoder)
        if task.index == 1:
            model.head = Cosine(
                model.encoder.width, len(task.labels), sigma=self.sigma, seed=self.seed
            )
            only_train(model, [*trained.values(), *model.head.parameters()])
            return
        known = memory.under(self.name)
        show_both(model.encoder)
        model.head = Prototype(model.encoder.width, len(known["count"]))
        model.head.restore(known["sum"], known["count"])
        only_train(model, [])

    def train_set(
        self, task: Task, memory: Memory, past: Sequence[Task]
    ) -> Sequence[Sample] | None:
        """The images of the first stage."""
        return task.train if task.index == 1 else None

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The prototypes of the task's classes, in both branches."""
        if task.index == 1:
            show_both(model.encoder)
            model.head = Prototype(model.encoder.width)
        memory.put(self.name, model.head.learn(len(task.labels), batches))

    def _attached(self, encoder: nn.Module) -> dict[str, nn.Parameter]:
        if self.adaptation == "adapter":
            return attach_adapters(encoder, rank=self.rank, dropout=self.dropout, seed=self.seed)
        if self.adaptation == "ssf":
            return attach_ssf(encoder, seed=self.seed)
        return attach_prompts(encoder, number=self.prompts, deep=self.adaptation == "vpt_deep")
