"""Sequential fine-tuning with the native routers frozen: the community's advice for sparse models.

Differs from `finetune` in this alone. ESFT (arXiv:2407.01906) and most tuning guides do so.
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.method import Tuned


@dataclass(frozen=True, kw_only=True)
class RouterFrozen(Tuned):
    """Train adapters or linears only; routing changes with the inputs, never with the router."""

    unlearns: ClassVar[bool] = True

    train_router: bool = False
