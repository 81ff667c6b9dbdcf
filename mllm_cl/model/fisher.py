"""The diagonal of the empirical Fisher information, measured where every engine has whole weights:
in the backward pass of what guards add.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model.surgery import Guard, guards
from mllm_cl.model.watch import evaluating, forward


def squared_gradients(
    model: nn.Module, batches: Iterable[dict[str, Tensor]]
) -> tuple[dict[str, Tensor], int]:
    """Sum over batches of (dL/dw)^2, L a batch's own loss, by guarded weight; and their number.

    With one sample to a batch this is the exact per-sample sum. Dropout is off and no gradient is
    kept. Collective where weights are sharded: every process has as many batches.
    """
    installed = guards(model)
    total = {path: torch.zeros_like(one.displacement) for path, one in installed.items()}
    gradient: dict[str, Tensor] = {}
    handles = [
        one.register_forward_hook(partial(_tap, gradient, path)) for path, one in installed.items()
    ]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    number = 0
    try:
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                engine.try_backward(_loss(model, batch), trained)
                number += 1
                for path in list(gradient):
                    total[path] += gradient.pop(path).square()
            if number:
                # ZeRO-3 holds on to what has no input to send a gradient to, as guards have none.
                with torch.no_grad():
                    forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return total, number


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss


def _tap(gradient: dict[str, Tensor], path: str, one: Guard, args: tuple, output: Tensor) -> None:
    if not torch.is_grad_enabled():
        return

    # A weight may be used more than once in a forward; its gradient is the sum.
    def add(part: Tensor) -> None:
        gradient[path] = gradient[path] + part if path in gradient else part.detach().clone()

    output.register_hook(add)
