"""Terms of the loss that depend on weights alone, computed inside forward, where a weight is whole
on every engine.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mllm_cl.drift.covariance import recomputing


def penalise(module: nn.Module, price: Callable[[], Tensor]) -> None:
    """Let `module` owe `price()`, a scalar of its own weights, with every forward that trains.

    A second price on the same module replaces the first.
    """
    if "owed" not in vars(module):
        # First in the row: ZeRO-3's own hook takes the weight away again.
        module.register_forward_hook(_note, prepend=True)
    module.price, module.owed = price, None


def is_penalised(module: nn.Module) -> bool:
    """Whether `module` has a price."""
    return vars(module).get("price") is not None


def forgive(model: nn.Module) -> None:
    """Take all prices away."""
    for module in model.modules():
        if is_penalised(module):
            module.price = module.owed = None


def due(model: nn.Module) -> Tensor | None:
    """What all modules owe since they were asked last, in its graph; None: nothing."""
    owed = []
    for module in model.modules():
        if is_penalised(module) and module.owed is not None:
            owed.append(module.owed)
            module.owed = None
    return torch.stack(owed).sum() if owed else None


def check_graph(module: nn.Module) -> None:
    """ValueError where `module` trains without a graph, so that no term of the loss reaches it."""
    if module.training and not torch.is_grad_enabled() and not recomputing():
        raise ValueError(
            "re-entrant gradient checkpointing leaves no graph for a term of the loss that is "
            "formed inside the model. Set 'gradient_checkpointing_kwargs: {use_reentrant: false}'."
        )


def _note(module: nn.Module, args: tuple, output: Tensor) -> None:
    if not is_penalised(module):
        return
    check_graph(module)
    if not torch.is_grad_enabled():
        return
    with torch.autocast(output.device.type, enabled=False):
        owed = module.price()
    # A recompute has to do the same work, but its graph is not the loss's.
    if not recomputing():
        module.owed = owed
