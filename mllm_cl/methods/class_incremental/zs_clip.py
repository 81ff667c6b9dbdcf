"""ZS-CLIP: a CLIP or SigLIP as it is, asked for the classes by their names.

Source: PROOF, arXiv:2305.19270, eq. 1 and its tables' row "ZS-CLIP"; CLIP, arXiv:2103.00020.
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.learner import ClassMethod
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce, Untrained
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.heads import Named
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class ZSCLIP(Untrained, ClassMethod):
    """No training and nothing to remember: f(x)_c = softmax_c( cos(g_i(x), t_c) / τ ) over the
    classes so far, t_c being the mean direction of all prompts of c and 1/τ the model's own scale.

    What every method on a CLIP is to be compared with: it forgets nothing and learns nothing. A
    class's answer depends on which classes there are, not on their order or stages.
    """

    reads: ClassVar[bool] = True

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """A head that compares with names, and everything frozen."""
        scale = float(model.encoder.backbone.logit_scale.detach().exp())
        model.head = Named(model.encoder.width, scale=scale)
        super().before_task(model, task, memory)

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The names of all classes so far are read."""
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """All names."""
        model.head.learn(model.texts((*task.earlier, *task.labels)))
