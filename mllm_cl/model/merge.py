"""Adapters become weights: what was learnt beside linears and experts joins them, so that plain
transformers can save and open the model.
"""

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model import osf
from mllm_cl.model.adapt import lora_layers, resting_experts
from mllm_cl.model.expert_lora import merge_expert_lora


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write every LoRA, expert LoRA and orthogonal split into the weight beside it, and take them
    off. Sums are fp32 and rounded once. Collective.

    Guards are folded first (`surgery.fold`). Raises ValueError, before anything is written, for
    mixtures whose router weighs every token, for a weight that another module shares, and for
    experts in four bits.
    """
    for path in resting_experts(model):
        raise ValueError(
            f"{path} weighs its adapters anew for every token: no one weight does what they do"
        )
    split = {**lora_layers(model), **osf.layers(model)}
    _refuse_shared(model, {path: layer.base_layer for path, layer in split.items()})
    merge_expert_lora(model)
    for path, layer in split.items():
        weight = layer.base_layer.weight
        whole = osf.effective(layer) if path in osf.layers(model) else _with_lora(layer)
        engine.write(weight, whole.to(weight.dtype))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base_layer)


def _with_lora(layer: nn.Module) -> Tensor:
    whole = engine.full(layer.base_layer.weight).float()
    for name, first in layer.lora_A.items():
        a_RD, b_OR = (engine.full(one.weight).float() for one in (first, layer.lora_B[name]))
        whole = whole + layer.scaling[name] * (b_OR @ a_RD)
    return whole


def _refuse_shared(model: nn.Module, linears: dict[str, nn.Module]) -> None:
    places: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(path)
    for path, linear in linears.items():
        own = f"{path}.base_layer.weight"
        others = [other for other in places[id(linear.weight)] if other != own]
        if others:
            raise ValueError(
                f"{path} shares its weight with {others[0]}, which has no adapter: merging would "
                "move both. Untie them (tie_word_embeddings: false), or keep the adapter apart."
            )
