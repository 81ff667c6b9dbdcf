"""Fine-tuning: both towers learn the tasks one after another; nothing holds what was learnt before.

A row of the cross-modal retrieval of PROOF (arXiv:2305.19270).
"""

from dataclasses import dataclass

from mllm_cl.memory import Memory
from mllm_cl.model.meeting import Matcher
from mllm_cl.model.surgery import only_train
from mllm_cl.pair_learner import PairMethod
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class Finetune(PairMethod):
    """CLIP's loss, (CE(s cos(x, t)) + CE(s cos(t, x))) / 2 within a batch, on all that sees and
    reads, and on the scale s. SigLIP, too, is tuned with this loss, not with its own sigmoid one.
    """

    def before_task(self, model: Matcher, task: Task, memory: Memory) -> None:
        """Both towers train, and the scale."""
        trained = [*model.encoder.towers, model.head.log_scale]
        only_train(model, trained if task.index else [])
