"""LoRA on the experts that a sparse model was born with, its routers and the rest frozen."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mllm_cl.method import Tuned


@dataclass(frozen=True, kw_only=True)
class ExpertLoRAMethod(Tuned):
    """W_e x + s B_e A_e x in every expert that a token visits, task after task, nothing held back.

    Differs from `finetune` in what trains. Frozen routers are what most guides for sparse models
    advise (ESFT, arXiv:2407.01906); `train_router: true` frees them, `lora_target_modules` adds
    linears.
    """

    unlearns: ClassVar[bool] = True

    experts: Literal["frozen", "lora", "whole"] = "lora"
    lora_target_modules: tuple[str, ...] | str = ()
    train_router: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts == "frozen":
            raise ValueError(
                "expert_lora trains the model's own experts, found 'experts: frozen'. Set it to "
                "lora, or choose finetune."
            )
