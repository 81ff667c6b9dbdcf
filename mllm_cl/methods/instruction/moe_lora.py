"""MoELoRA of CoIN (arXiv:2403.08350): LoRA experts under a softmax router all training."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.method import Tuned


@dataclass(frozen=True, kw_only=True)
class MoELoRAMethod(Tuned):
    """y = W x + s sum_i softmax(W_G x)_i B_i A_i x, task after task without a balancing loss.

    The per-expert product of CoIN, not the cross terms sum_ij w_i w_j B_j A_i of some later forks.
    Defaults: 8 experts (CoIN), rank 8 each; native routers stay frozen, as the original has none.
    """

    unlearns: ClassVar[bool] = True

    num_experts: int = 8
    train_router: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_experts:
            raise ValueError(
                "moe_lora is a mixture of LoRA experts, found num_experts 0. Set it to two or "
                "more (8 in CoIN), or choose finetune."
            )
