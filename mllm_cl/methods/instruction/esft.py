"""ESFT, expert-specialised fine-tuning (arXiv:2407.01906): a task trains only the experts that its
tokens use; routers, shared experts, attention and all other experts stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Reduce, Tuned
from mllm_cl.model.experts import experts
from mllm_cl.model.surgery import guard, installed_on, only_train
from mllm_cl.model.watch_experts import chosen_experts
from mllm_cl.task import Task


@dataclass(frozen=True, kw_only=True)
class ESFT(Tuned):
    """Per layer the fewest experts, best first, whose scores sum to `share` of all experts' scores.

    score: `token` is the share of choices that fell on an expert, `gate` the mean weight it had
        (the paper's thresholds: 0.2 and 0.1). Scores are normalised over the experts of a layer;
        the released script divides by a sum over layers.
    experts: `whole` trains their weights as the paper does, `lora` an adapter on each.
    Every task chooses anew. The experts that do not train are masked, not left out of memory.
    """

    unlearns: ClassVar[bool] = True

    experts: Literal["frozen", "lora", "whole"] = "whole"
    lora_target_modules: tuple[str, ...] | str = ()
    train_router: bool = False
    score: Literal["token", "gate"] = "token"
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share lies in (0, 1], found {self.share}")
        if self.experts == "frozen" or self.lora_target_modules or self.train_router:
            raise ValueError(
                "esft trains experts and nothing else: set experts to whole or lora, and leave "
                "lora_target_modules and train_router out, or choose finetune."
            )

    def before_task(self, model: nn.Module, task: Task, memory: Memory) -> None:
        """A free displacement beside every expert; which of them move is decided in start_task."""
        for path, one in experts(model).items():
            if not one.switched:
                raise ValueError(
                    f"the experts at {path} do not say which of them each token visits, so none "
                    "can be chosen by use. Choose expert_lora instead."
                )
        for site in self.sites(model):
            guard(site.module, site.name)
        only_train(model, [])

    def start_task(
        self, model: nn.Module, task: Task, memory: Memory, batches: Batches, reduce: Reduce
    ) -> None:
        """Score the experts on the task's data; the chosen ones are kept for the record."""
        found = experts(model)
        for path, scores in chosen_experts(model, found, batches, reduce).items():
            active_E = best(scores[self.score == "gate"], self.share)
            memory[f"esft/{task.name}/{path}"] = active_E.cpu()
            for one in installed_on(found[path].module).values():
                one.active_E = active_E.float().to(one.displacement.device)

    def forecast_bytes(self, model: nn.Module, num_tasks: int) -> int:
        return num_tasks * sum(one.num_experts for one in experts(model).values())


def best(score_E: Tensor, share: float) -> Tensor:
    """The fewest experts, best first, that hold `share` of the sum of scores: bool (E,)."""
    value_E, order_E = score_E.sort(descending=True, stable=True)
    before_E = value_E.cumsum(0) - value_E
    active_E = torch.zeros_like(score_E, dtype=torch.bool)
    # An expert is needed as long as those before it do not hold the share; a token's rounding less.
    active_E[order_E[before_E < share * score_E.sum() * (1 - 1e-9)]] = True
    return active_E
