"""The model that the task began with, as a teacher: every guard leaves this task's step out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mllm_cl.model.surgery import guards
from mllm_cl.model.watch import evaluating, forward


def incoming(model: nn.Module, batch: dict[str, Tensor]) -> object:
    """What the model answered to a batch before the task: no gradients, no dropout.

    It is the incoming model where all that trains is guarded. One forward pass and no second copy
    of any weight. Collective under sharding: every process asks at the same point of a step.
    """
    with _steps_left_out(model), evaluating(model):
        return forward(model, batch)


@contextmanager
def _steps_left_out(model: nn.Module) -> Iterator[None]:
    installed = list(guards(model).values())
    for one in installed:
        one.left_out = True
    try:
        yield
    finally:
        for one in installed:
            one.left_out = False
