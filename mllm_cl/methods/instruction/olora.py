"""O-LoRA (arXiv:2310.14152): a LoRA for every task, whose rows are kept orthogonal to those of all
tasks before it, which stay as they are and go on answering.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.memory import Memory
from mllm_cl.method import Tuned
from mllm_cl.model.adapt import Site, lora_layers, lora_sites, router_sites
from mllm_cl.model.penalty import due, forgive, is_penalised, penalise
from mllm_cl.model.surgery import only_train
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class OLoRA(Tuned):
    """y = W x + s sum_{i<=t} B_i A_i x; L + strength * sum over linears and i < t of |A_i A_t^T|_1.

    Only A_t and B_t train; forward costs one more low-rank product per task. The paper's second
    term, on the norm of the new factors, is left to the weight decay. Native routers stay frozen,
    as the original has none.
    """

    train_router: bool = False
    strength: float = 0.5  # lambda_1 of the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts or not self.use_peft:
            raise ValueError(
                f"olora trains one plain LoRA per task, found num_experts {self.num_experts} and "
                f"use_peft {self.use_peft}. Set 'num_experts: 0' and 'use_peft: true'."
            )
        if self.experts != "frozen":
            raise ValueError(
                f"olora trains linears, found 'experts: {self.experts}', which it would leave "
                "alone. Leave experts out, or choose expert_lora or esft."
            )
        if self.strength <= 0:
            raise ValueError(f"strength must be positive, found {self.strength}")

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """A LoRA for this task, beside those of all before it."""
        forgive(model)  # what the last task's rows owed; they are frozen now
        # What comes before the first task trains nothing, and is handed on to the first.
        sites = [self._sites_of(model, number) for number in range(1, max(1, task.index) + 1)][-1]
        native = router_sites(model) if self.train_router else []
        self.listen(model, native)
        only_train(model, [site.weight for site in (*sites, *native)])

    def before_forward(self, model: nn.Module, inputs: dict[str, Tensor], memory: Memory) -> None:
        """Before the first step: gather what the rows have to stay orthogonal to."""
        for layer in lora_layers(model).values():
            *past, now = layer.lora_A.values()
            if past and not is_penalised(now):
                past_RD = torch.cat([engine.full(one.weight).float() for one in past])
                penalise(now, partial(_overlap, self.strength, past_RD, now))

    def loss(
        self, model: nn.Module, inputs: dict[str, Tensor], outputs: object, memory: Memory
    ) -> Tensor | None:
        return due(model)

    def _sites_of(self, model: nn.Module, number: int) -> list[Site]:
        return lora_sites(
            model,
            self.lora_target_modules,
            rank=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            seed=self.seed * 7919 + number,  # equal draws would overlap as much as they can
            adapter=f"task_{number}",
        )


def _overlap(strength: float, past_RD: Tensor, now: nn.Linear) -> Tensor:
    return strength * (past_RD @ now.weight.float().mT).abs().sum()
