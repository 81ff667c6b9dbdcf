"""CoOp: words before the class names are learnt, and both towers of a CLIP stay as they are.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", arXiv:2109.01134, as a row of
PROOF's tables (arXiv:2305.19270).
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.exemplars import OptionalRehearsal
from mllm_cl.memory import Memory
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.spoken import Spoken, attach_words
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class CoOp(OptionalRehearsal):
    """f(x)_c = softmax_c( s cos(g_i(x), g_t([v_1 ... v_M, name of c])) ), by cross entropy on v
    alone, which all classes and tasks share; s is the model's own.

    With exemplars it is over all classes so far; without, over those of the task, since names that
    no image defends are only pushed away. Prompts of the recipe are not read: the learnt words
    stand in their place. Defaults: 16 words from N(0, 0.02^2) (section 4), no exemplars. No code of
    PROOF's row is published: what it says of neither is ours.
    """

    reads: ClassVar[bool] = True

    memory_per_class: int | None = 0
    words: int = 16

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The learnt words in the place of a text's first; they alone train."""
        super().before_task(model, task, memory)
        encoder = model.encoder
        model.reader, words = attach_words(encoder, model.reader, number=self.words, seed=self.seed)
        scale = encoder.backbone.logit_scale.detach().exp().item()
        model.head = Spoken(encoder.width, encoder.text, scale=scale)
        model.local = not self.rehearses
        model.head.hold(len(task.earlier), len(task.labels))
        if task.index:
            model.head.learn((*task.earlier, *task.labels), model.reader)
        only_train(model, [words] if task.index else [])
