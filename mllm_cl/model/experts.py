"""The fused expert stacks of a natively sparse Hugging Face model: where they are, how they lie.

No model family is named here. Beside each router of `anatomy.routers` is one module that owns two
stacks. Where its class goes through transformers' experts switch, the flags of the switch say how
they lie and the shapes have to agree; elsewhere the shapes alone say it.

Shapes: E experts, D model width, I inner width of one expert.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from torch import nn

from mllm_cl import engine
from mllm_cl.model.anatomy import routers, top_k
from mllm_cl.model.quantised import stacks_in
from mllm_cl.model.walk import walk

# What transformers' decorator of experts classes sets on every instance.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class Experts:
    """One module that holds E experts in two stacks: `up` (E, 2I, D), `down` (E, D, I).

    `up` gives I alone unless `gated`; `transposed` stacks are (E, D, 2I) and (E, I, D).
    `interleaved` says that rows of gate and up alternate, instead of all of gate first.
    `width` is what enters the experts, the router's width unless a projection comes between.
    """

    path: str
    module: nn.Module
    up: str
    down: str
    num_experts: int
    width: int
    inner: int
    transposed: bool
    gated: bool
    interleaved: bool
    biased: bool
    # Whether the forward goes through transformers' experts switch (`ALL_EXPERTS_FUNCTIONS`).
    switched: bool
    router: str
    top_k: int
    # Experts of the same layer that every token visits, by qualified name.
    shared: tuple[str, ...]
    # What is added to scores for the selection alone: no gradient reaches these. They are buffers
    # or parameters, to be frozen and to be saved.
    corrections: tuple[str, ...]
    # Llama 4: all experts run on all tokens, and routing weights multiply what they are given.
    scales_input: bool


@dataclass(frozen=True)
class _Layout:
    """One reading of two stacks that their shapes allow."""

    up: str
    down: str
    num_experts: int
    width: int
    inner: int
    transposed: bool
    gated: bool


def experts(model: nn.Module) -> dict[str, Experts]:
    """The expert stacks that each router of a sparse model feeds, by the name of their module.

    Empty for a dense model. PEFT's wrappers are looked through, as in `routers`.

    Raises ValueError where a router feeds no stacks that are understood (experts that are modules
    of their own, or stacks in a module each), or their shapes contradict the class's flags or allow
    two readings.
    """
    feeding = routers(model)
    chosen = top_k(model)
    live = {name: module for name, module, _ in walk(model)}
    found: dict[str, Experts] = {}
    for router, module in feeding.items():
        num_rows = _num_rows(module)
        path = _fed(router, num_rows, live)
        if path in found:
            raise ValueError(
                f"{path} lies beside two routers, {found[path].router} and {router}: which one "
                "feeds its experts is not known"
            )
        found[path] = _described(path, router, num_rows, chosen[router], live)
    _refuse_unrouted(found, live)
    return found


def _described(
    path: str, router: str, num_rows: int, num_chosen: int, live: Mapping[str, nn.Module]
) -> Experts:
    module = live[path]
    layout = _layout(path, module)
    scales_input = not is_switched(module) and _takes_inputs_only(module)
    return Experts(
        path=path,
        module=module,
        **vars(layout),
        # No shape says it. transformers has the flag because all but what bears it do not.
        interleaved=layout.gated and not vars(module).get("is_concatenated", True),
        biased=_is_biased(path, module, layout),
        switched=is_switched(module),
        router=router,
        top_k=num_chosen,
        shared=_shared(path, live),
        corrections=_corrections(path, router, {num_rows, layout.num_experts}, live),
        scales_input=scales_input,
    )


def is_switched(module: nn.Module) -> bool:
    """Whether these are experts whose forward is chosen by transformers' switch."""
    return all(flag in vars(module) for flag in _FLAGS)


def _takes_inputs_only(module: nn.Module) -> bool:
    """Whether the forward is given neither which experts run nor with what weight.

    Then every expert runs on every token, and what it is given has its weight in it already.
    """
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and the inputs


def _num_rows(router: nn.Module) -> int:
    # Not a linear layer's tensor: quantised weights are packed.
    return router.out_features if isinstance(router, nn.Linear) else engine.shape(router.weight)[0]


def _own(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own parameters but adapters', packed ones as they were."""
    kept = {
        name: tuple(engine.shape(parameter))
        for name, parameter in module.named_parameters(recurse=False)
        if "_lora_" not in name
    }
    return kept | {name: tuple(stack.shape) for name, stack in stacks_in(module).items()}


def _stacks(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own (E, ., .) parameters but adapters'."""
    return {name: shape for name, shape in _own(module).items() if len(shape) == 3}


def _blocks(path: str) -> Iterator[str]:
    """The names of the modules around one, innermost first, up to its layer."""
    while path and not path.rpartition(".")[2].isdigit():
        path = path.rpartition(".")[0]
        yield path


def _is_within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(f"{block}.")


def _fed(router: str, num_rows: int, live: Mapping[str, nn.Module]) -> str:
    """The module with expert stacks nearest to a router of that many rows."""
    block = ""
    for block in _blocks(router):
        near = [
            name
            for name, module in live.items()
            if _is_within(name, block) and _has_experts(module, num_rows)
        ]
        if len(near) == 1:
            return near[0]
        if near:
            raise ValueError(
                f"which experts the router {router} feeds is not known: {', '.join(near)} are "
                "equally near"
            )
    seen = [
        f"{name}.{key} {shape}"
        for name, module in live.items()
        if _is_within(name, block)
        for key, shape in _stacks(module).items()
    ]
    raise ValueError(
        f"the experts that the router {router} feeds were not found. Looked in {block or 'all'} "
        f"for one module with two stacks of E = {num_rows} experts: (E, 2I, D) and (E, D, I), both "
        f"transposed, or I instead of 2I. Found: {', '.join(seen) or 'no stack'}. Experts that are "
        "modules of their own, flat matrices and stacks in a module each are not supported: train "
        "other weights, or take a transformers that fuses them."
    )


def _has_experts(module: nn.Module, num_rows: int) -> bool:
    """Whether a module owns expert stacks, which has to be believed where its class says so."""
    rows = [shape[0] for shape in _stacks(module).values()]
    return is_switched(module) or rows.count(num_rows) >= 2


def _layout(path: str, module: nn.Module) -> _Layout:
    readings = list(_readings(module))
    if len(readings) != 1:
        stacks = ", ".join(f"{name} {shape}" for name, shape in _stacks(module).items()) or "none"
        flags = ", ".join(f"{flag}={vars(module)[flag]}" for flag in _FLAGS if flag in vars(module))
        raise ValueError(
            f"how the experts in {path} ({type(module).__name__}) lie is not known: expected two "
            "stacks (E, 2I, D) and (E, D, I), or both transposed, or (E, I, D) and (E, D, I) where "
            f"the class says so. Found: {stacks}; flags of the class: {flags or 'none'}; readings: "
            f"{len(readings)}."
        )
    return readings[0]


def _readings(module: nn.Module) -> Iterator[_Layout]:
    """Every layout that a module's shapes and its class's flags allow.

    With a gate there is at most one, D = I and D = 2I included: both products together tell.
    With neither gate nor flags there are several: (E, I, D) may be up, or down transposed.
    """
    stacks, flags = _stacks(module), vars(module)
    switched = is_switched(module)
    # The names that every implementation behind the switch reads.
    names = ("gate_up_proj" if switched and flags["has_gate"] else "up_proj", "down_proj")
    pairs = [names] if switched else permutations(stacks, 2) if len(stacks) == 2 else []
    for up, down in pairs:
        if up not in stacks or down not in stacks or stacks[up][0] != stacks[down][0]:
            continue
        for transposed in (flags["is_transposed"],) if switched else (False, True):
            num_experts, *up_sizes = stacks[up]
            _, *down_sizes = stacks[down]
            out, width = reversed(up_sizes) if transposed else up_sizes
            back, inner = reversed(down_sizes) if transposed else down_sizes
            for gated in (flags["has_gate"],) if switched else (False, True):
                if back == width and out == (2 if gated else 1) * inner:
                    yield _Layout(up, down, num_experts, width, inner, transposed, gated)


def _is_biased(path: str, module: nn.Module, layout: _Layout) -> bool:
    """Whether both products add a bias (E, .); refuses whatever else the layout does not explain.

    A class without flags may do anything with a further parameter.
    """
    out = layout.inner * (2 if layout.gated else 1)
    biases = {
        f"{layout.up}_bias": (layout.num_experts, out),
        f"{layout.down}_bias": (layout.num_experts, layout.width),
    }
    stacks = layout.up, layout.down
    rest = {name: shape for name, shape in _own(module).items() if name not in stacks}
    declared = vars(module)["has_bias"] if is_switched(module) else bool(rest)
    if rest != (biases if declared else {}):
        raise ValueError(
            f"{path} ({type(module).__name__}) holds parameters that are not understood: "
            f"{rest or 'no biases'}; beside {layout.up} and {layout.down} expected "
            f"{biases if declared else 'nothing'}"
        )
    return declared


def _shared(path: str, live: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """What is called shared in the modules around `path`, but gates of one matrix."""
    around = set(_blocks(path))
    return tuple(
        name
        for name, module in live.items()
        if name.rpartition(".")[0] in around
        and "share" in name.rpartition(".")[2]
        and sum(len(engine.shape(weight)) >= 2 for weight in module.parameters()) >= 2
    )


def _corrections(
    path: str, router: str, sizes: set[int], live: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """The tensors of a block that are called a bias of something and have a number per expert.

    A plain `bias` belongs to the logits and is trained with them.
    """
    block = next(block for block in _blocks(router) if _is_within(path, block))
    return tuple(
        f"{name}.{key}"
        for name, module in live.items()
        if _is_within(name, block)
        for own in (module.named_parameters, module.named_buffers)
        for key, tensor in own(recurse=False)
        if "bias" in key and key != "bias" and engine.shape(tensor).numel() in sizes
    )


def _refuse_unrouted(found: Mapping[str, Experts], live: Mapping[str, nn.Module]) -> None:
    lost = [name for name, module in live.items() if is_switched(module) and name not in found]
    if lost:
        raise ValueError(
            f"no router was found for the experts in {', '.join(lost)}. Some models choose the "
            "experts of a few layers without one, by the token's id: these are not supported. "
            "Train other weights."
        )
