"""Where a method may train: the weights of adapters, of chosen linears and of native routers.

D model width, R LoRA rank, E experts.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from mllm_cl.model.anatomy import routers
from mllm_cl.model.expert_lora import adapted, attach_expert_lora, stacks
from mllm_cl.model.experts import Experts, experts
from mllm_cl.model.linears import linears
from mllm_cl.model.moe_lora import MoELoRA, attach_moe_lora
from mllm_cl.model.quantised import is_packed_linear, stacks_in
from mllm_cl.model.surgery import installed_on

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Role = Literal["router", "weight", "A", "B"]


@dataclass(frozen=True)
class Site:
    """One weight that a method may train.

    `source` is the qualified name of the module whose input the weight meets: x for a router, a
    linear and a LoRA A; for a LoRA B the same x, which reaches it through `before`, the site of its
    A. `layer` is the frozen linear beside which the two add `scale` B A x. `native` marks the
    routers that the model was born with. At fused `experts` the weight is a stack, and `source`
    ends in the name of the stack that it meets the input of.
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
    experts: Experts | None = None

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
    """The weights of the linears that `patterns` match, to be trained whole.

    Raises ValueError for linears in four bits.
    """
    found = linears(model, patterns)
    for path, module in found.items():
        if is_packed_linear(module):
            raise ValueError(
                f"{path} is kept in four bits, so it cannot train whole: set 'use_peft: true', or "
                "load the model without load_in_4bit"
            )
    return [Site(path, module, "weight", "weight", path) for path, module in found.items()]


def lora_sites(
    model: nn.Module,
    patterns: Sequence[str] | str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    adapter: str = "default",
) -> list[Site]:
    """PEFT LoRA on the matched linears, put in place once; both factors of each are sites.

    Of several adapters on one linear, which answer together, the sites are those of `adapter`.
    Raises ValueError where a pattern matches nothing.
    """
    if not any(adapter in layer.lora_A for layer in lora_layers(model).values()):
        config = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        # A linear with an adapter of another name stands below that.
        targets = [path.removesuffix(".base_layer") for path in linears(model, patterns)]
        _inject_lora(model, targets, config, seed=seed, adapter=adapter)
    found = []
    for path, layer in lora_layers(model).items():
        source, behind = f"{path}.lora_A.{adapter}", f"{path}.lora_B.{adapter}"
        beside = {"layer": layer.base_layer, "scale": layer.scaling[adapter]}
        first = Site(source, layer.lora_A[adapter], "weight", "A", source, **beside)
        second = Site(behind, layer.lora_B[adapter], "weight", "B", source, first, **beside)
        found += [first, second]
    return found


def _inject_lora(
    model: nn.Module, targets: list[str], config: dict[str, float], *, seed: int, adapter: str
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are wanted
        # PEFT draws A from the global generator; every rank and every rerun must draw the same.
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(**config, target_modules=targets), model, adapter_name=adapter
        )
    for layer in lora_layers(model).values():
        layer.set_adapter(list(layer.lora_A))


def lora_layers(model: nn.Module) -> dict[str, "LoraLayer"]:
    """The linears that have a LoRA of PEFT's beside them, by name."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


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


def expert_lora_sites(model: nn.Module, *, rank: int, alpha: float, seed: int) -> list[Site]:
    """LoRA on the model's own experts, put in place once: A and B of both products of each block.

    Raises ValueError for a model without experts.
    """
    if not adapted(model):
        found = experts(model)
        if not found:
            raise ValueError(
                f"'experts: lora' adapts the experts a model was born with, but "
                f"{type(model).__name__} has none. Leave it out, or set num_experts for a mixture "
                "of LoRA experts beside its linears."
            )
        attach_expert_lora(model, found, rank=rank, alpha=alpha, seed=seed)
    found = []
    for path, lora in adapted(model).items():
        for name, _, _ in stacks(lora.layout):
            source, module = f"{path}.{name}", lora.layout.module
            beside = {"layer": module, "scale": lora.scale, "experts": lora.layout}
            first = Site(source, module, f"{name}_lora_A", "A", source, **beside)
            found += [first, Site(source, module, f"{name}_lora_B", "B", source, first, **beside)]
    return found


def expert_sites(model: nn.Module) -> list[Site]:
    """The stacks of the model's own experts, to be trained whole.

    Raises ValueError for experts in four bits.
    """
    found = experts(model)
    for path, one in found.items():
        if stacks_in(one.module):
            raise ValueError(
                f"the experts at {path} are kept in four bits, so they cannot train whole: set "
                "'experts: lora', or load the model without load_in_4bit"
            )
    return [
        Site(f"{path}.{name}", one.module, name, "weight", f"{path}.{name}", experts=one)
        for path, one in found.items()
        for name, _, _ in stacks(one)
    ]


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
