"""Sequential fine-tuning: task after task with nothing held back. What everybody does, and what forgets."""

from dataclasses import dataclass

from mllm_cl.method import Tuned


@dataclass(frozen=True, kw_only=True)
class FineTune(Tuned):
    """Train the same weights (a LoRA, or whole linears, and the native routers) on each task in turn."""
