"""Routers held by distillation: their probabilities on what is rehearsed stay where they were.

`replay` with a term that holds the routing; it differs from `router_replay`, which fixes the
choices while training, and from `same`, which needs no past sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_cl.drift.distil import divergence, token_share
from mllm_cl.memory import Memory
from mllm_cl.method import Displaced, Rehearsing
from mllm_cl.model.routing import Said, heard, listen
from mllm_cl.model.teacher import incoming
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class RouterKL(Displaced, Rehearsing):
    """L + strength * mean over routers and the tokens they saw of KL(p_before || p_now).

    p_before is the softmax of a router's logits in the incoming model, which looks at every batch
    once more. The term counts every sample of the batch alike: the task's own and, as in `replay`,
    past ones from a buffer of `buffer_bytes`, which are trained on too. `buffer_bytes: 0` keeps no
    past sample, and so holds the routing of the task's own inputs alone.
    """

    strength: float = 1.0  # ours

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength <= 0 or self.buffer_bytes < 0:
            raise ValueError(
                f"found strength {self.strength} and buffer_bytes {self.buffer_bytes}: expected a "
                "positive strength and a buffer of 0 bytes or more."
            )

    @property
    def rehearsal(self) -> bool:
        return self.buffer_bytes > 0

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        counted = Displaced.forecast_bytes(self, model, num_tasks)
        return counted + Rehearsing.forecast_bytes(self, model, num_tasks)

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        self.sites(model)  # puts mixtures in place, whose routers are listened to as well
        listen(model)
        super().before_task(model, task, memory)

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        if not self.knows(memory):
            return None
        now = heard(model)
        incoming(model, inputs)
        before = heard(model)
        share_BT = token_share(inputs["attention_mask"])
        terms = [
            divergence(before[path].logits_NE, said.logits_NE, _share(share_BT, said))
            for path, said in now.items()
            if path in before
        ]
        return self.strength * torch.stack(terms).mean()


def _share(share_BT: Tensor, said: Said) -> Tensor:
    """What each of a router's rows weighs: an image encoder's patches, which no mask counts, all
    alike; tokens of which a router gets some as in the batch, to a sum of 1.
    """
    if said.token_N is None:
        return share_BT.new_full((len(said.logits_NE),), 1 / len(said.logits_NE))
    share_N = share_BT.flatten()[said.token_N]
    if len(share_N) == share_BT.numel():
        return share_N
    return share_N / share_N.sum().clamp_min(torch.finfo(share_N.dtype).tiny)
