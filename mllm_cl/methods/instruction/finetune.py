"""Sequential fine-tuning, nothing held back: what everybody does, and what forgets."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.method import Tuned


@dataclass(frozen=True, kw_only=True)
class FineTune(Tuned):
    """Train the same weights (LoRA or whole linears, and native routers) on each task in turn."""

    unlearns: ClassVar[bool] = True
