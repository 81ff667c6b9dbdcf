"""What trains is kept in fp32 under a bf16 or fp16 model: bf16 has 8 significant bits, and rounds
an update below 1/512 of a weight away.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from mllm_cl import engine


def widen(model: nn.Module) -> list[str]:
    """Give every trained weight below fp32 an fp32 master in its place, and return their names.

    Its module reads it rounded to what it had, so outputs stay as they are; its gradient, the
    optimizer and what is saved are fp32. Parameters keep their identity and their names. ZeRO-3
    keeps masters of its own. Call it after `method.before_task`; `continual` does.
    """
    names, dtypes = narrow(model), {}
    for name in names:
        parameter = model.get_parameter(name)
        dtypes[id(parameter)] = parameter.dtype
        parameter.data = parameter.data.float()
    for module in model.modules():
        own = {key: dtypes[id(p)] for key, p in module._parameters.items() if id(p) in dtypes}
        if own and "_rounded_dtypes" not in vars(module):
            module._rounded_dtypes, module._unrounded_forward = own, module.forward
            module.forward = MethodType(_rounded_forward, module)
    return names


def narrow(model: nn.Module) -> list[str]:
    """The names of trained parameters below fp32 of which no engine keeps an fp32 master."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.is_floating_point()
        and parameter.dtype.itemsize < 4
        and not engine.keeps_master(parameter)
    ]


def check_wide(model: nn.Module) -> None:
    """Raise ValueError where small updates of what trains would be rounded away."""
    names = narrow(model)
    if names:
        dtype = str(model.get_parameter(names[0]).dtype).removeprefix("torch.")
        raise ValueError(
            f"{len(names)} trained weights are {dtype} ({names[0]} is the first), which rounds "
            "small updates away. Call mllm_cl.model.precision.widen(model) after before_task and "
            "before the optimizer is made, or load the model in float32 and let accelerate's "
            "mixed_precision do the rest."
        )


def _rounded_forward(self: nn.Module, *args, **kwargs):
    """The module's own forward, which reads its masters in the dtype of what enters it."""
    first = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
    hidden = {
        key: self._parameters[key].to(_read_as(first, d)) for key, d in self._rounded_dtypes.items()
    }
    # An instance attribute hides the parameter, which stays registered for the engine's hooks.
    vars(self).update(hidden)
    try:
        return self._unrounded_forward(*args, **kwargs)
    finally:
        for key in hidden:
            del vars(self)[key]


def _read_as(entering: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    # PEFT hands its adapters fp32 inputs where their weights are fp32.
    if entering is None or not entering.is_floating_point():
        return dtype
    return entering.dtype
