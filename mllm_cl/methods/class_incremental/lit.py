"""LiT: the text tower of a CLIP is tuned while its image tower is locked.

Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning", arXiv:2111.07991, as a
row of PROOF's tables (arXiv:2305.19270).
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.exemplars import OptionalRehearsal
from mllm_cl.memory import Memory
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.spoken import Spoken
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class LiT(OptionalRehearsal):
    """CLIP's own loss on images and the first prompts of their classes,
    (CE(s cos(x, t)) + CE(s cos(t, x))) / 2 within a batch of all processes, on the text tower and
    its projection. The answer is the nearest text of all classes so far, by all prompts.

    Images of one class are no negatives of one another here, since a stage has few classes. The
    scale s is the model's own and stays. Exemplars are none by default. No code of PROOF's row is
    published: what it says of neither is ours.
    """

    reads: ClassVar[bool] = True

    memory_per_class: int | None = 0

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """All that reads trains."""
        super().before_task(model, task, memory)
        encoder = model.encoder
        scale = encoder.backbone.logit_scale.detach().exp().item()
        model.head = Spoken(encoder.width, encoder.text, scale=scale, pairs=True)
        model.head.hold(len(task.earlier), len(task.labels))
        if task.index:
            model.head.learn((*task.earlier, *task.labels), model.reader)
        reading = [
            one
            for name, one in encoder.backbone.named_parameters()
            if name.startswith(("text_model.", "text_projection."))
        ]
        only_train(model, reading if task.index else [])
