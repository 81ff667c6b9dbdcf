"""Where a method may train: the weights of adapters, of chosen linears and of native routers.

D model width, R LoRA rank, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mllm_cl.model.anatomy import routers
from mllm_cl.model.linears import linears
from mllm_cl.model.moe_lora import MoELoRA, attach_moe_lora
from mllm_cl.model.surgery import installed_on

Role = Literal["router", "weight", "A", "B"]


@dataclass(frozen=True)
class Site:
    """One weight that a method may train.

    `source` is the qualified name of the module whose input the weight meets: x for a router, a
    linear and a LoRA A; for a LoRA B the same x, which reaches it through `before`, the site of its
    A. `layer` is the frozen linear beside which the two add `scale` B A x. `native` marks the
    routers that the model was born with.
    """

    path: str
    module: nn.Module
    name: str
    role: Role
    source: str
    before: "Site | None" = None
    native: bool = False
    layer: nn.Module | None = None
    scale: float = 1.0

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return self.module._parameters[self.name]


def router_sites(model: nn.Module) -> list[Site]:
    """The native routers of a sparse model; empty for a dense one."""
    return [
        Site(path, module, "weight", "router", path, native=True)
        for path, module in routers(model).items()
    ]


def weight_sites(model: nn.Module, patterns: Sequence[str] | str) -> list[Site]:
    """The weights of the linears that `patterns` match, to be trained whole."""
    return [
        Site(path, module, "weight", "weight", path)
        for path, module in linears(model, patterns).items()
    ]


def lora_sites(
    model: nn.Module,
    patterns: Sequence[str] | str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> list[Site]:
    """PEFT LoRA on the matched linears, put in place once; both factors of each are sites.

    Raises ValueError where a pattern matches nothing.
    """
    from peft.tuners.lora import LoraLayer

    present = {
        path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    if not present:
        targets = list(linears(model, patterns))
        _inject_lora(model, targets, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
        present = {
            path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)
        }
    found = []
    for path, layer in present.items():
        source, behind = f"{path}.lora_A.default", f"{path}.lora_B.default"
        beside = {"layer": layer.base_layer, "scale": layer.scaling["default"]}
        first = Site(source, layer.lora_A["default"], "weight", "A", source, **beside)
        second = Site(behind, layer.lora_B["default"], "weight", "B", source, first, **beside)
        found += [first, second]
    return found


def _inject_lora(
    model: nn.Module, targets: list[str], *, rank: int, alpha: float, dropout: float, seed: int
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng():
        # PEFT draws A from the global generator; every rank and every rerun must draw the same.
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def moe_lora_sites(
    model: nn.Module,
    patterns: Sequence[str] | str,
    *,
    num_experts: int,
    rank: int,
    alpha: float,
    top_k: int | None,
    seed: int,
) -> list[Site]:
    """A routed mixture of LoRA experts on the matched linears, put in place once: router, A, B."""
    present = {
        path: module for path, module in model.named_modules() if isinstance(module, MoELoRA)
    }
    if not present:
        targets = linears(model, patterns)
        attach_moe_lora(
            model, targets, num_experts=num_experts, rank=rank, alpha=alpha, top_k=top_k, seed=seed
        )
        present = {
            path: module for path, module in model.named_modules() if isinstance(module, MoELoRA)
        }
    found = []
    for path, moe in present.items():
        source = f"{path}.router"
        beside = {"layer": model.get_submodule(path.rpartition(".")[0]), "scale": moe.scale}
        first = Site(path, moe, "lora_A", "A", source, **beside)
        router = Site(source, moe.router, "weight", "router", source)
        found += [router, first, Site(path, moe, "lora_B", "B", source, first, **beside)]
    return found


def resting_experts(model: nn.Module) -> dict[str, MoELoRA]:
    """The mixtures of LoRA experts, whose experts may rest, by the name of their router."""
    return {
        f"{path}.router": module
        for path, module in model.named_modules()
        if isinstance(module, MoELoRA)
    }


def rest(model: nn.Module) -> None:
    """Spare the resting LoRA experts their gradients: which ones rest is what their guards say."""
    for moe in resting_experts(model).values():
        one = installed_on(moe).get("lora_A")
        resting = one is not None and one.active_E is not None
        moe.active = one.active_E.bool() if resting else None
