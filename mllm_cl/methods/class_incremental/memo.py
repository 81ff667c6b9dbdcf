"""MEMO: early blocks that all tasks share, the last ones anew for each, and exemplars.

Source: Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental
Learning", arXiv:2205.13218, section 4, and its released code.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mllm_cl.exemplars import Rehearsal
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.surgery import only_train
from mllm_cl.model.tails import Expanding, attach_tails, own_weights, start_tail
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class MEMO(Rehearsal):
    """f = [φ_1(g); …; φ_b(g)], g the shared blocks' answer, φ_t the copy of task t, which begins
    where the one before it ended; earlier copies are frozen.

        L = CE(H f, y) + α CE(H_a φ_b(g), y_a),  y_a = 0 for old classes, else y − old + 1

    then the rows of new classes are made as long as those of old ones (weight alignment). The first
    task has no second term. DER (arXiv:2103.16788) copies the whole model instead.

    `blocks` of a transformer are copied, with the norm behind them (LAMDA-PILOT's ViT: one, 7.1 of
    85.8 M parameters; C3Box's CLIP: and the projection). `train_base` goes on training what is
    shared after the first task: the paper fixes it, the command of its aligned runs does not.
    `first: head` leaves all of the encoder as it is in the first task, too, as C3Box does.
    `budget_mb` counts the copies that there are: what each takes is not there for exemplars.
    """

    blocks: int = 1
    alpha: float = 1.0
    train_base: bool = False
    first: Literal["all", "head"] = "all"

    @property
    def told_apart(self) -> str:
        return "all"

    def before_task(self, model: Classifier, task: Task, memory: Memory) -> None:
        """A copy for every task; the newest trains, with a head on all of them."""
        if task.index == 0:
            only_train(model, [])
            return
        encoder = model.encoder
        width, sight = encoder.width, encoder.sight
        ends = attach_tails(encoder, task.index, blocks=self.blocks)
        model.head = Expanding(encoder.width, self.seen(memory), seed=self.seed)
        model.head.grow(len(task.labels))
        if task.index > 1:
            model.head.watch(width, self.alpha)
        own = {id(one) for module in ends for one in own_weights(module, 1).values()}
        if task.index == 1:
            trained = [*sight.values()] if self.first == "all" else []
        else:
            trained = [p for module in ends for p in own_weights(module, task.index).values()]
            if self.train_base:
                trained += [one for one in sight.values() if id(one) not in own]
        only_train(model, [*trained, *model.head.parameters()])
        super().before_task(model, task, memory)

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The newest copy begins where the one before it ended."""
        if task.index > 1:
            start_tail(model.encoder, task.index)

    def after_task(
        self, model: Classifier, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Exemplars of the task, and the head as it answers."""
        self.keep(model, task, memory, batches)
        super().after_task(model, task, memory, batches, reduce)
        self.recall(model, task, memory)

    def recall(self, model: Classifier, task: Task, memory: Memory) -> None:
        """The head without its auxiliary."""
        model.head = model.head.settled()
