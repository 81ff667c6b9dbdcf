"""What a model has learnt in LoRA factors as the tensors and the config of a PEFT adapter's folder:
in PEFT's own layout, and with a module for each expert, as servers read it.

D input width, O output width, I inner width of one expert, E experts, R LoRA rank of one expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model.adapt import lora_layers
from mllm_cl.model.expert_lora import adapted, stacks
from mllm_cl.model.experts import Experts, experts

if TYPE_CHECKING:
    from peft import LoraConfig

HEAD = "base_model.model"  # where PEFT keeps the model that it adapts


@dataclass(frozen=True)
class LowRank:
    """`scale` B A beside one linear, A (R, D) and B (O, R), or, both with a leading E, beside one
    stack of the experts `layout`.
    """

    a: Tensor
    b: Tensor
    scale: float
    layout: Experts | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


@torch.no_grad()
def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """All LoRA factors of a model, fp32, under one scale: linears by name, stacks of experts by the
    name of the parameter. Guards on them are folded first (`surgery.fold`). Collective.

    Several adapters on one linear, which answer together, are one of the sum of their ranks.
    """
    found = {path: _of_linear(layer) for path, layer in lora_layers(model).items()}
    for path, lora in adapted(model).items():
        for name, _, _ in stacks(lora.layout):
            a, b = (lora.layout.module._parameters[f"{name}_lora_{one}"] for one in "AB")
            a, b = engine.full(a).float(), engine.full(b).float()
            found[f"{path}.{name}"] = LowRank(a, b, lora.scale, lora.layout)
    scale = next((one.scale for one in found.values()), 1.0)
    return {
        name: replace(one, b=one.b * (one.scale / scale), scale=scale)
        for name, one in found.items()
    }


def _of_linear(layer: nn.Module) -> LowRank:
    scale = next(iter(layer.scaling.values()))
    firsts = [engine.full(one.weight).float() for one in layer.lora_A.values()]
    seconds = [
        engine.full(one.weight).float() * (layer.scaling[name] / scale)
        for name, one in layer.lora_B.items()
    ]
    return LowRank(torch.cat(firsts), torch.cat(seconds, dim=1), scale)


def in_peft_layout(
    found: Mapping[str, LowRank], empty: nn.Module
) -> tuple[dict[str, Tensor], "LoraConfig"]:
    """The tensors and the config with which `PeftModel.from_pretrained` opens the factors.

    Of a stack A is (E R, D) and B (O, R E), the expert the fastest index of B's columns. Two stacks
    of one module are wrapped one in the other: PEFT itself says, on the `empty` model (on the meta
    device), which name is whose.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer, ParamWrapper

    linears = [name for name, one in found.items() if one.layout is None]
    fused = [name for name, one in found.items() if one.layout is not None]
    config = _config(found, linears, fused)
    places = {}
    for place, layer in get_peft_model(empty, config).named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = place = place.removeprefix(f"{HEAD}.")
        if isinstance(layer, ParamWrapper):
            name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        places[name] = place
    differ = sorted(places.keys() ^ found.keys())
    assert not differ, f"PEFT adapts other weights than this model has adapters on: {differ[:3]}"
    tensors = {}
    for name, place in places.items():
        a, b = _flat(found[name])
        tensors |= _pair(place, a, b)
    return tensors, config


def _flat(one: LowRank) -> tuple[Tensor, Tensor]:
    if one.layout is None:
        return one.a, one.b
    a_ERD, b_EOR = one.a, one.b
    if one.layout.transposed and not one.layout.switched:
        # No flag of the class tells PEFT that these stacks are (E, D, O): its A spans the output.
        a_ERD, b_EOR = b_EOR.mT, a_ERD.mT
    return a_ERD.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)


def in_expert_layout(found: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], "LoraConfig"]:
    """The same factors with a module for every projection of every expert, `EXPERTS.3.up_proj`.

    Gate and up share A; the rows of B are those of one of them.
    """
    tensors, linears, ends = {}, [], set()
    for name, one in found.items():
        if one.layout is None:
            linears.append(name)
            tensors |= _pair(name, one.a, one.b)
            continue
        path, _, stack = name.rpartition(".")
        for part, rows in parts(one.layout, stack).items():
            ends.add(part)
            for expert, (a_RD, b_OR) in enumerate(zip(one.a, one.b[:, rows], strict=True)):
                tensors |= _pair(f"{path}.{expert}.{part}", a_RD, b_OR)
    return tensors, _config(found, [*linears, *sorted(ends)], [])


def parts(layout: Experts, stack: str) -> dict[str, slice]:
    """The projections that a stack holds, and which of its output rows are theirs."""
    if stack == layout.down:
        return {"down_proj": slice(None)}
    if not layout.gated:
        return {"up_proj": slice(None)}
    if layout.interleaved:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return {"gate_proj": slice(None, layout.inner), "up_proj": slice(layout.inner, None)}


@torch.no_grad()
def add_expert_layout(model: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Add what a file in the layout of `in_expert_layout` holds to the weights of a plain model, as
    a server does that merges it.
    """
    stacked = experts(model)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        a_RD, b_OR = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        moved = scale * (b_OR.double() @ a_RD.double())
        path = name.removeprefix(f"{HEAD}.").removesuffix(".lora_A.weight")
        home, _, end = path.rpartition(".")
        home, _, expert = home.rpartition(".")
        if home in stacked:
            place = _rows_of(stacked[home], int(expert), end)
        else:
            place = model.get_submodule(path).weight
        place.copy_((place.double() + moved.to(place.device)).to(place.dtype))


def _rows_of(layout: Experts, expert: int, part: str) -> Tensor:
    """One projection of one expert (O, D): a view of its stack."""
    stack = layout.down if part == "down_proj" else layout.up
    weight = layout.module._parameters[stack][expert]
    return (weight.mT if layout.transposed else weight)[parts(layout, stack)[part]]


def _pair(path: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{HEAD}.{path}.lora_A.weight": a, f"{HEAD}.{path}.lora_B.weight": b}


def _config(found: Mapping[str, LowRank], modules: list[str], fused: list[str]) -> "LoraConfig":
    from peft import LoraConfig

    kinds = {(one.rank, one.scale) for one in found.values()}
    assert len(kinds) == 1, f"adapters of several ranks or scales: {kinds}"
    rank, scale = kinds.pop()
    alpha = scale * rank
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=modules,
        target_parameters=fused or None,
    )
