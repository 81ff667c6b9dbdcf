"""CODA-Prompt: every picture gets keys and values of its own, a weighted sum of all components.

Source: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for
Rehearsal-Free Continual Learning", arXiv:2211.13218, section 4. Unlike DualPrompt nothing is
chosen, so that gradients of the cross entropy reach what weighs the components.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_cl.learner import LinearLearner
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce
from mllm_cl.model.components import Components, begin
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.prompts import Query, attach_keys, attach_prefix, chosen_blocks
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class CODAPrompt(LinearLearner):
    """In each of `blocks` the keys and values Σ_m w_m P_m join those of the attention, with
    w_m = cos(q ⊙ A_m, K_m) and q the frozen encoder's feature of the picture. A task brings
    `components` more, orthogonal to all before them (Gram–Schmidt); those stay to the bit, and go
    on being summed. Of `length` tokens half are keys and half values.

        loss = CE over the task's classes + orthogonality · Σ over P, A, K of mean (U Uᵀ − I)²

    Defaults: the released configurations have a pool of 100 for ten tasks, that is 10 a task, and
    orthogonality 0 (the paper has 0.1; a released note says that it "can be 0" since components
    begin orthogonal). They train with Adam at 0.001 on a cosine and batches of 128. There a new
    component loses its projections on the old ones one by one, which leaves it orthogonal to them
    only as long as those are to each other; here it is to all that they span.
    """

    components: int = 10
    length: int = 8
    blocks: tuple[int, ...] = (0, 1, 2, 3, 4)
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for tokens that cannot be halved, and a term that would be a reward."""
        if self.length % 2 or self.length < 2:
            raise ValueError(f"found length {self.length}: half are keys and half are values")
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality is 0 or more, found {self.orthogonality}")

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """The task's components begin orthogonal to those before them."""
        for name, module in model.encoder.named_modules():
            if isinstance(module, Components):
                begin(module, seed=self.seed, name=name)

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        """What components owe that are not orthogonal."""
        return outputs.owed

    def attach(self, encoder: Encoder, tasks: int) -> Sequence[nn.Parameter]:
        """The task's components; earlier ones are frozen."""
        device, query = next(encoder.parameters()).device, Query()
        size = self.components, 2, self.length // 2, encoder.anatomy.width
        trained = []
        for block in chosen_blocks(encoder, self.blocks):
            pool = [torch.zeros(size, device=device) for _ in range(tasks)]
            prefix = Components(
                pool, query.choice, width=encoder.width, strength=self.orthogonality
            )
            attach_prefix(encoder, block, prefix)
            trained += [family[-1] for family in prefix.families()]
        attach_keys(encoder, query)
        return trained
