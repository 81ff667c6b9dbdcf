"""Routing replay: tokens go to the experts that the model before the task chose for them.

R3 (arXiv:2510.11370) replays the choices of an inference engine in reinforcement learning, to keep
training and inference on one routing; here those of the incoming model are replayed, to keep a task
from moving the choices. `router_kl` pulls the probabilities back instead and binds no choice.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Displaced, Reduce
from mllm_cl.model.routing import forget_choices, note_choices, replay_choices
from mllm_cl.model.teacher import incoming
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class RouterReplay(Displaced):
    """While training, S(x) = top-k of the incoming model; the weights of the experts in S(x) are
    what the router that trains gives them: for a softmax router exp(s_i) / sum_{j in S} exp(s_j).

    The incoming model looks at every batch first (a forward pass more); afterwards, and in
    evaluation, routers choose by themselves. Weights of routers so learn under old choices, but
    nothing keeps the choice itself: measure it. An expert that is never chosen learns nothing.
    """

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        super().before_task(model, task, memory)
        replay_choices(model)

    def before_forward(self, model: nn.Module, inputs: dict[str, Tensor], memory: Memory) -> None:
        """Let the incoming model choose for this batch."""
        if self.knows(memory):
            note_choices(model, lambda: incoming(model, inputs))

    def after_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        super().after_task(model, task, memory, batches, reduce)
        forget_choices(model)
