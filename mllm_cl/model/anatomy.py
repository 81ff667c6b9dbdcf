"""The native routers of a Hugging Face model, by name, and tables of modules to look at.

No model family is named here. A model of transformers declares which of its modules it records
`router_logits` from; the router is the module below those that owns the weight. Where nothing is
declared, it is the one weight with a row per expert in the block that holds the experts.

Shapes: T tokens, D model width, E experts.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from mllm_cl import engine
from mllm_cl.model.quantised import stacks_in
from mllm_cl.model.walk import bare, is_recorded, walk

if TYPE_CHECKING:
    from rich.table import Table

# Fields that count experts, of configs and modules (`n_routed_experts`, `num_router_classes`).
_COUNT = re.compile(r"(?!.*shared)(\w+_)?n(um)?_\w*(experts|router_classes)")
# Fields that count the experts of one token (`num_experts_per_tok`, `top_k_experts`, `moe_topk`).
_PER_TOKEN = re.compile(r"\w*experts?_per_tok(en)?|\w*top_?k_experts?|moe_(top_?)?k")


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The native routers of a sparse model: qualified name -> module that owns the (E, D) `weight`.

    Empty for a dense model. Layers without experts have no entry; layers that route twice (text and
    images apart, or attention and feed-forward) have two. PEFT's wrappers and parametrizations are
    looked through: the name leads to the module inside.

    Raises ValueError if the config counts experts and no router is found, if none of the weights in
    a recorded module can be its router's, or if a fused kernel routes without calling the router.
    """
    found = recorded_routers(model)
    for name in found:
        _refuse_kernel(model, name)
    if not found:
        _refuse_hidden_experts(model)
    return found


def top_k(model: nn.Module) -> dict[str, int]:
    """How many experts each token visits, per router of `routers(model)`.

    Said by the router or a module around it (`top_k`), else by the config of its language model.
    Raises ValueError if neither says it in exactly one number.
    """
    return {name: _top_k(model, name) for name in routers(model)}


def logits(router: nn.Module, inputs: Tensor) -> Tensor:
    """The logits (T, E) of a module of `routers`, before any softmax or correction: x W^T + bias.

    `inputs` (..., D) is what the router's `forward` was given: `args[0]` in a forward hook (not a
    pre-hook: some routers put their training noise into it in place). They are recomputed because
    outputs differ by family: (logits, weights, indices), (scores, logits), probabilities first, or
    the logits alone. That costs E / (3 k F) of the work of k experts of width F. In fp32 at least,
    also under autocast: a bf16 model's own logits are these, rounded. Where PEFT's LoRA wraps an
    `nn.Linear` router, the adapter's share is added outside that module, so it is not in here.
    """
    weight_ED = router.weight
    dtype = torch.promote_types(weight_ED.dtype, torch.float32)
    inputs_TD = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    bias_E = dict(router.named_parameters(recurse=False)).get("bias")
    with torch.autocast(inputs.device.type, enabled=False):
        logits_TE = inputs_TD @ weight_ED.to(dtype).T
        return logits_TE if bias_E is None else logits_TE + bias_E.to(dtype)


def table(modules: Mapping[str, nn.Module]) -> "Table":
    """What `routers` or `linears` found, to look at: a row per shape and name, layers starred."""
    return shape_table({bare(name): _weight_shape(module) for name, module in modules.items()})


def shape_table(shapes: Mapping[str, tuple[int, ...]], title: str = "modules") -> "Table":
    """Names and shapes to look at: a row per shape and name, layers starred, and their sum."""
    from rich.table import Column, Table

    rows: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = re.sub(r"\b\d+\b", "*", name), tuple(shape)
        rows[key] = rows.get(key, 0) + 1
    numbers = [Column(name, no_wrap=True) for name in ("count", "shape", "weights")]
    shown = Table(Column(title, overflow="fold"), *numbers)  # a name is never cut
    for (name, shape), count in rows.items():
        shown.add_row(
            name, str(count), " x ".join(map(str, shape)), f"{count * math.prod(shape):,}"
        )
    total = sum(count * math.prod(shape) for (_, shape), count in rows.items())
    shown.add_row("total", str(len(shapes)), "", f"{total:,}", style="bold")
    return shown


def recorded_routers(model: nn.Module) -> dict[str, nn.Module]:
    """What `routers` finds, without its refusals: for whoever only wants to leave routers alone."""
    counts = set(_expert_counts(model).values())
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, router in _undeclared(model, counts):
        found.setdefault(id(router), (name, router))
    for name, module, recorders in walk(model):
        if any(is_recorded(name, module, recorder) for recorder in recorders):
            for owner_name, owner in _owners(name, module, counts):
                # A block and the router in it may both be recorded, and modules may be shared.
                found.setdefault(id(owner), (owner_name, owner))
    return dict(found.values())


def _undeclared(model: nn.Module, counts: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The routers of submodels that declare none: each beside a stack (E, ., .) of experts."""
    silent = {name: module for name, module, recorders in walk(model) if not recorders}
    for name, module in silent.items():
        sizes = [engine.shape(parameter) for parameter in module.parameters(recurse=False)]
        sizes += [stack.shape for stack in stacks_in(module).values()]
        for num_experts in counts & {size[0] for size in sizes if len(size) == 3}:
            yield from _beside(name, num_experts, silent)


def _beside(
    stack: str, num_experts: int, modules: Mapping[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """The one weight with a row per expert in the block around a stack of them, if it is one.

    The layer around the block is not searched: its projections may have as many rows by chance.
    """
    block = stack
    while block and not block.rpartition(".")[2].isdigit():
        inside = [
            (name, module)
            for name, module in modules.items()
            if name.startswith(f"{block}.") and _weight_shape(module)[:1] == (num_experts,)
        ]
        if inside:
            return inside if len(inside) == 1 else []
        block = block.rpartition(".")[0]
    return []


def _owners(name: str, recorded: nn.Module, counts: set[int]) -> list[tuple[str, nn.Module]]:
    """The modules at or below a recorded one that own its routing weight (E, D): usually itself."""
    if _weight_shape(recorded):
        return [(name, recorded)]
    below = [(at, module) for at, module, _ in walk(recorded, name) if _weight_shape(module)]
    if len(below) == 1:
        return below
    counts = counts | {
        value for key, value in vars(recorded).items() if _counts_experts(key, value)
    }
    # Product keys choose among E experts by two halves of floor(sqrt(E)) scores (arXiv:1907.05242).
    rows = counts | {2 * math.isqrt(count) for count in counts}
    owners = [(at, module) for at, module in below if _weight_shape(module)[0] in rows]
    if not owners:
        shapes = ", ".join(f"{at} {_weight_shape(module)}" for at, module in below) or "none"
        raise ValueError(
            f"{name} ({type(recorded).__name__}) is recorded as a router, but none of the "
            f"weights in it has one row per expert (experts: {sorted(counts)}; weights: {shapes})."
        )
    return owners


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The true shape of the matrix that maps a module's input, () if it has none."""
    if isinstance(module, nn.Embedding):
        return ()
    if isinstance(module, nn.Linear):
        # Not the tensor's: quantised weights are packed.
        return module.out_features, module.in_features
    if parametrize.is_parametrized(module, "weight"):
        weight = module.parametrizations["weight"].original
    else:
        weight = dict(module.named_parameters(recurse=False)).get("weight")
    shape = () if weight is None else tuple(engine.shape(weight))
    return shape if len(shape) == 2 else ()


def _counts_experts(key: str, value: object) -> bool:
    return type(value) is int and value > 1 and _COUNT.fullmatch(key) is not None


def _expert_counts(model: nn.Module) -> dict[str, int]:
    """Every field of the configs in `model` that counts experts."""
    configs = (
        module.config.to_dict()
        for _, module, _ in walk(model)
        if isinstance(module, PreTrainedModel)
    )
    return {
        key: value
        for config in configs
        for key, value in config.items()
        if _counts_experts(key, value)
    }


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The module called `name` and those around it, innermost first, `model` last."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]


def _refuse_kernel(model: nn.Module, name: str) -> None:
    for module in _ancestors(model, name):
        if _is_kernelised(module):
            raise ValueError(
                f"{type(module).__name__} around the router {name} runs a fused kernel that routes "
                "by itself, so the router is never called. Load the model without 'use_kernels' "
                "and without a kernel_config."
            )


def _is_kernelised(module: nn.Module) -> bool:
    """Whether the `kernels` library has put another forward into this very module.

    It marks classes it may replace, and where no kernel fits it sets the class's own forward.
    """
    marked = any("kernel_layer_name" in vars(cls) for cls in type(module).__mro__)
    forward = vars(module).get("forward")
    return marked and inspect.ismethod(forward) and forward.__func__ is not type(module).forward


def _refuse_hidden_experts(model: nn.Module) -> None:
    """Refuse a model without routers whose config counts experts.

    Unless it says how its routers would be recorded and has no experts either: all layers dense.
    """
    counts = _expert_counts(model)
    declares = any(recorders for _, _, recorders in walk(model))
    sizes = (engine.shape(parameter) for parameter in model.parameters())
    has_experts = any(len(size) == 3 and size[0] in counts.values() for size in sizes)
    if counts and (has_experts or not declares):
        fields = ", ".join(f"{key}={value}" for key, value in counts.items())
        why = "it holds no module of the classes declared" if declares else "no class declares any"
        raise ValueError(
            f"the config of {type(model).__name__} counts experts ({fields}), but no router was "
            "found. Looked for the modules that transformers records 'router_logits' from "
            f"(`_can_record_outputs`): {why}. Nor is there just one weight with a row per expert "
            "beside the experts. Declare the router's class there, or take a newer transformers."
        )


def _top_k(model: nn.Module, name: str) -> int:
    around = _ancestors(model, name)
    submodel = next(
        index for index, module in enumerate(around) if isinstance(module, PreTrainedModel)
    )
    for module in around[:submodel]:
        said = vars(module).get("top_k")
        if type(said) is int:
            return said
    fields = around[submodel].config.to_dict()
    said = {
        key: value
        for key, value in fields.items()
        if _PER_TOKEN.fullmatch(key) and type(value) is int
    }
    if len(set(said.values())) != 1:
        raise ValueError(
            f"how many experts a token visits at {name} is not known: expected one number in the "
            f"config of {type(around[submodel]).__name__} (num_experts_per_tok or the like), found "
            f"{said or 'none'}"
        )
    return next(iter(said.values()))
