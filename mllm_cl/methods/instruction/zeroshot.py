"""The model as it comes, never trained: the lower reference of every table."""

from dataclasses import dataclass
from typing import ClassVar

from mllm_cl.method import Tuned, Untrained


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Untrained, Tuned):
    """No training at all; every task is scored with the incoming model.

    It takes the settings of the others, so that one recipe serves all, and uses none.
    """

    unlearns: ClassVar[bool] = True

    train_router: bool = False
