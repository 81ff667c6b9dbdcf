"""PROOF's second path: projections of images and of captions that expand with the tasks, and fusion
with learnt context, on a frozen CLIP or SigLIP.

Source: Zhou et al., "Learning without Forgetting for Vision-Language Models", arXiv:2305.19270
(TPAMI 2025), section on cross-modal retrieval; its scripts are not released.
"""

from dataclasses import dataclass

from mllm_cl.memory import Memory
from mllm_cl.model.meeting import Fused, Matcher
from mllm_cl.model.surgery import only_train
from mllm_cl.pair_learner import PairMethod
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class Proof(PairMethod):
    """Both encoders stay as they are; a task adds a linear projection for images, one for texts and
    `context` prompts, and trains them with the attention that all tasks share:

        score = cos(P(z), P(w)) + cos(z̃, w̃),   z̃ = T([P(z), C])_0,   w̃ = T([P(w), C])_0
        L = InfoNCE(cos(P(z), P(w))) + InfoNCE(cos(z̃, w̃)),   both at the model's own scale, learnt

    with P = Σ_m P_m on each side. There are no classes, so the context is prompts alone, and what
    is compared of an image does not depend on the captions: N x M scores cost N + M passes.
    Old projections and prompts stay frozen on both sides. `residual` adds the features themselves
    to each projection, which starts at zero.

    Defaults: 3 prompts, dropout 0.1 and layer norm after the residual, as for classes. What the
    paper leaves open of retrieval is ours; no exemplars.
    """

    context: int = 3
    dropout: float = 0.1
    residual: bool = False
    seed: int = 0

    def before_task(self, model: Matcher, task: Task, memory: Memory) -> None:
        """A projection of each side and a context for every task so far; the newest train."""
        encoder = model.encoder
        model.head = Fused(
            encoder.width,
            log_scale=encoder.backbone.logit_scale,
            context=self.context,
            dropout=self.dropout,
            residual=self.residual,
            seed=self.seed,
        )
        for _ in range(task.index):
            model.head.expand()
        only_train(model, model.head.newest() if task.index else [])
