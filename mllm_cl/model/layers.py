"""The linears that a method changes, and what a state of the run says that they add.

N tokens, D input width, O output width, E experts, R LoRA rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl.model.anatomy import recorded_routers
from mllm_cl.model.moe_lora import MoELoRA
from mllm_cl.model.surgery import installed_on

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear that a method changes, by what it adds to the frozen model's answer."""

    path: str
    module: nn.Module

    def added(self, state: State, input_ND: Tensor, logits_NE: Tensor | None) -> Tensor | None:
        """What the layer answers by `state` (of `surgery.trained_state`), None if it holds none."""
        raise NotImplementedError

    def change(
        self, before: State, after: State, input_ND: Tensor, logits_NE: Tensor | None
    ) -> Tensor | None:
        """What it answers with `after` minus what with `before` on the same inputs: (N, O).

        A mixture's routing is held at `logits_NE`: its router's own drift is not counted here.
        None where the states do not tell.
        """
        first = self.added(before, input_ND, logits_NE)
        last = self.added(after, input_ND, logits_NE)
        return None if last is None or first is None else last - first


class Whole(Layer):
    """A linear whose own weight trains, or a displacement beside it."""

    def added(self, state: State, input_ND: Tensor, logits_NE: Tensor | None) -> Tensor | None:
        weight_OD = effective(state, f"{self.path}.weight")
        return None if weight_OD is None else input_ND @ weight_OD.mT


@dataclass(frozen=True)
class LowRank(Layer):
    """A linear with PEFT's LoRA beside it, or with one for each task, by name."""

    scales: Mapping[str, float]

    def added(self, state: State, input_ND: Tensor, logits_NE: Tensor | None) -> Tensor | None:
        parts = []
        for adapter, scale in self.scales.items():
            a_RD = effective(state, f"{self.path}.lora_A.{adapter}.weight")
            b_OR = effective(state, f"{self.path}.lora_B.{adapter}.weight")
            if a_RD is not None and b_OR is not None:
                parts.append(scale * (input_ND @ a_RD.mT @ b_OR.mT))
        # One that was added since had no share in the answer then.
        return sum(parts[1:], parts[0]) if parts else None


@dataclass(frozen=True)
class Mixture(Layer):
    """A linear with a routed mixture of LoRA experts beside it."""

    scale: float
    top_k: int | None

    def added(self, state: State, input_ND: Tensor, logits_NE: Tensor | None) -> Tensor | None:
        a_ERD = effective(state, f"{self.path}.moe_lora.lora_A")
        b_EOR = effective(state, f"{self.path}.moe_lora.lora_B")
        if a_ERD is None or b_EOR is None or logits_NE is None:
            return None
        weight_NE = _weights(logits_NE, self.top_k)
        # Experts that were added since had no share in what was routed then.
        weight_NE = functional.pad(weight_NE, (0, len(a_ERD) - weight_NE.shape[-1]))
        low_NER = torch.einsum("nd,erd->ner", input_ND, a_ERD) * weight_NE[..., None]
        return self.scale * torch.einsum("ner,eor->no", low_NER, b_EOR)


def _weights(logits_NE: Tensor, top_k: int | None) -> Tensor:
    """What `MoELoRA.route` makes of these logits."""
    weight_NE = logits_NE.softmax(-1)
    if top_k is None:
        return weight_NE
    kept = weight_NE.topk(top_k, dim=-1)
    share = kept.values / kept.values.sum(-1, keepdim=True)
    return torch.zeros_like(weight_NE).scatter(-1, kept.indices, share)


def effective(state: State, name: str) -> Tensor | None:
    """The weight `name` in a state, with its displacement if there is one; fp32.

    Of a weight that only has a displacement, that: the base is the same in every state.
    """
    parts = [state[key].float() for key in (name, f"{name}::displacement") if key in state]
    return sum(parts[1:], parts[0]) if parts else None


def trained_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear of `model` that trains: whole, by a LoRA, or by a mixture of them.

    Routers are not among them, nor are weights of more than two dimensions.
    """
    found: dict[str, Layer] = {}
    inside = {id(router) for router in recorded_routers(model).values()}
    for path, module in model.named_modules():
        layer = None if id(module) in inside else _layer(path, module)
        if layer is not None:
            found[path] = layer
            # Adapters are made of linears that are no layers of their own.
            inside |= {id(child) for child in module.modules()}
    return found


def _layer(path: str, module: nn.Module) -> Layer | None:
    from peft.tuners.lora import LoraLayer

    moe = module._modules.get("moe_lora")
    if isinstance(moe, MoELoRA):
        return Mixture(path, module, moe.scale, moe.top_k)
    if isinstance(module, LoraLayer):
        return LowRank(path, module, dict(module.scaling))
    if isinstance(module, nn.Linear) and (
        "weight" in installed_on(module) or module.weight.requires_grad
    ):
        return Whole(path, module)
    return None
