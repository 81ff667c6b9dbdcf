"""What methods for pairs of images and captions have in common."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method, Reduce
from mllm_cl.model.meeting import Matcher, SideBySide
from mllm_cl.model.surgery import only_train
from mllm_cl.model.tails import attach_towers, own_weights, start_tail
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """A method whose model is a `Matcher`: its head compares the features of images and texts as
    they are, unless the method gives it another.

    It sees no sample of a past task again, and has nothing to remember but what it trained. The
    negatives of a pair are those of a micro-batch, of all processes together: where gradients are
    accumulated, a step has as many pairs, but each pair fewer negatives.
    """

    setting: ClassVar[str] = "retrieval"
    engines: ClassVar[tuple[str, ...]] = ("single", "ddp", "zero1", "zero2", "fsdp2")
    reads: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TowerMethod(PairMethod):
    """A method that has a copy of both towers, or of their ends, for each task.

    The first task trains the towers themselves, whole. A later copy begins where the one before it
    ended, and is all that trains, beside the scale.

        score = mean_t cos_t,   L = InfoNCE(mean_t cos_t) + alpha InfoNCE(cos_newest)

    at the model's own scale; the first task has no second term.
    """

    alpha: float = 1.0

    @property
    def copied(self) -> int:
        """How many blocks of each tower have copies, with all behind them; 0: all of both."""
        return 0

    def before_task(self, model: Matcher, task: Task, memory: Memory) -> None:
        """A copy for every task; the newest trains."""
        encoder, number = model.encoder, max(task.index, 1)
        width, newest = encoder.width, encoder.towers
        ends = attach_towers(encoder, number, blocks=self.copied)
        if number > 1:
            newest = [one for end in ends for one in own_weights(end, number).values()]
        scale = encoder.backbone.logit_scale
        model.head = SideBySide(width, number, log_scale=scale, weight=self.alpha)
        only_train(model, [*newest, model.head.log_scale] if task.index else [])

    def start_task(
        self, model: Matcher, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The newest copy begins where the one before it ended."""
        if task.index > 1:
            start_tail(model.encoder, task.index)
