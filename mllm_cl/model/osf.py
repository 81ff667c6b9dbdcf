"""PEFT's orthogonal subspace fine-tuning on chosen linears: a weight split by its singular values.

O output width, D input width, L minor directions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mllm_cl import engine

if TYPE_CHECKING:
    from peft.tuners.osf.layer import OSFLayer

_ADAPTER, _PARTS = "default", ("U_low", "S_low", "V_low")


def inject(model: nn.Module, targets: list[str], preserved: float) -> None:
    """Split the linears `targets`; the leading `preserved` share of each one's directions stays."""
    from peft import OSFConfig, inject_adapter_in_model

    inject_adapter_in_model(OSFConfig(target_modules=targets, effective_rank=preserved), model)


def layers(model: nn.Module) -> dict[str, "OSFLayer"]:
    """The linears that are split, by name."""
    from peft.tuners.osf.layer import OSFLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, OSFLayer)}


def parts(layer: "OSFLayer") -> list[nn.Parameter]:
    """What trains: U (O, L), S (L), V (L, D)."""
    return [layer.osf_svd_params[_ADAPTER][name] for name in _PARTS]


def initial(layer: "OSFLayer") -> list[Tensor]:
    """What the parts were when the weight was split."""
    kept = layer._osf_U_low_init, layer._osf_S_low_init, layer._osf_V_low_init
    return [each[_ADAPTER] for each in kept]


@torch.no_grad()
def decompose(layer: "OSFLayer", weight_OD: Tensor) -> None:
    """Split `weight_OD` in place of the weight that the layer had; as many directions train."""
    from peft import OSFConfig

    layer.base_layer.weight.copy_(weight_OD)
    layer._detach_hooks()
    layer.update_layer(_ADAPTER, layer.effective_rank[_ADAPTER], OSFConfig())


@torch.no_grad()
def effective(layer: "OSFLayer") -> Tensor:
    """The weight with what the parts have learnt, fp32. Collective."""
    u_OL, s_L, v_LD = (engine.full(part).float() for part in parts(layer))
    before_OL, before_L, before_LD = (each.float() for each in initial(layer))
    change_OD = (u_OL * s_L) @ v_LD - (before_OL * before_L) @ before_LD
    return layer.base_layer.weight.float() + change_OD
