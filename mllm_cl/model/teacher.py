"""The model that the task began with, as a teacher: without this task's step where all that trains
is guarded, as a copy where weights train themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from mllm_cl import engine
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


def keep_copy(model: nn.Module) -> nn.Module:
    """Give a bare model a copy of itself as its teacher, which nothing trains, shards or saves, and
    return it.

    For `before_task`, after it was decided what trains: frozen weights are shared, each of the
    others is there once more, on every process whole. `fill_copy` brings it to where the task
    begins.
    """
    vars(model).pop("_teacher", None)  # of the task before
    shared = {id(one): one for one in model.parameters() if not one.requires_grad}
    copied = deepcopy(model, shared).eval().requires_grad_(False)
    vars(model)["_teacher"] = (copied,)  # in a tuple, which no module registers
    return copied


@torch.no_grad()
def fill_copy(model: nn.Module) -> None:
    """Bring the copy, if `keep_copy` made one, to the model's weights and place. Collective.

    For a model on its engine, before the first step and before a checkpoint is loaded.
    """
    copied = teacher_of(model)
    if copied is None:
        return
    others = dict(copied.named_parameters())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            others[name].data = engine.full(weight).to(weight.dtype)
    copied.to(next(model.parameters()).device)


def teacher_of(model: nn.Module) -> nn.Module | None:
    """The copy that `keep_copy` made, None where the model has none."""
    return vars(model).get("_teacher", (None,))[0]
