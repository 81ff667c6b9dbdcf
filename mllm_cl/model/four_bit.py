"""A whole model in four bits: what is packed as it loads, what stays as it is, and the proof.

Linear layers are bitsandbytes' own, by transformers; fused experts are ours (`quantised`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model.anatomy import recorded_routers
from mllm_cl.model.expert_lora import run_frozen, runs_here
from mllm_cl.model.experts import Experts, experts
from mllm_cl.model.linears import heads
from mllm_cl.model.quantised import (
    BLOCK,
    QuantisedStack,
    is_packed_linear,
    pack,
    replace_stack,
    stacks_in,
    weight_bytes,
)

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import BitsAndBytesConfig

# What shards weights would cut packed ones at any byte.
ENGINES = ("single", "ddp", "zero1", "zero2")
_MOST_LEFT = 0.1  # of the experts' bytes that may stay unpacked without being named: ours


class FourBitSettings(Protocol):
    """What of a recipe's `model:` block says how to pack."""

    bnb_4bit_quant_type: str | None
    use_bnb_nested_quant: bool | None
    unquantised: tuple[str, ...] | None


def config(settings: FourBitSettings, empty: nn.Module, dtype: torch.dtype) -> "BitsAndBytesConfig":
    """What transformers is told: routers, output heads and what the recipe names stay as they are.

    `empty` is the model on the meta device. Raises ValueError for a name that no module has.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(settings.use_bnb_nested_quant),
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(_left(empty, settings)),
    )


def check_engine(used: str) -> None:
    """Raise ValueError for an engine that takes no packed weights."""
    if used not in ENGINES:
        raise ValueError(
            f"found true, but {used} takes no packed weights: {', '.join(ENGINES)} do. Choose "
            "another launch file, or leave load_in_4bit out"
        )


def saved_bytes(empty: nn.Module, settings: FourBitSettings) -> int:
    """How many bytes fewer a model takes, from its shapes."""
    left, (found, _) = _left(empty, settings), _experts(empty)
    weights = [
        module.weight
        for name, module in empty.named_modules()
        if type(module) is nn.Linear and not _within(name, left)
    ]
    weights += [
        layout.module._parameters[name]
        for path, layout in found.items()
        for name in (layout.up, layout.down)
        if not _within(path, left)
    ]
    scale_bits = 8 + 32 / 256 if settings.use_bnb_nested_quant else 32
    packed = sum(weight.numel() for weight in weights) * (4 + scale_bits / BLOCK) / 8
    return sum(weight.nbytes for weight in weights) - round(packed)


def pack_experts(model: nn.Module, settings: FourBitSettings) -> None:
    """Pack the experts of a model whose linears are packed, and let them run here.

    Raises ValueError where more than a tenth of the experts' bytes would stay as they are without
    being named in `unquantised`.
    """
    allowed = _named(model, settings.unquantised or ())
    found, obstacle = _experts(model)
    for path, layout in found.items():
        if _within(path, allowed):
            continue
        for name in (layout.up, layout.down):
            stack = layout.module._parameters[name]
            packed = pack(
                stack,
                quant_type=settings.bnb_4bit_quant_type or "nf4",
                nested=bool(settings.use_bnb_nested_quant),
            )
            replace_stack(layout.module, name, packed)
    _refuse_unpacked(model, allowed, obstacle)
    run_frozen(model, found)
    for module in model.modules():
        if is_packed_linear(module):
            # With it bitsandbytes turns weights into another layout, and to bf16, in evaluation.
            module.support_avx512bf16_for_cpu = False


def table(model: nn.Module) -> "Table":
    """Bytes by the class of the module that holds them and by how they are kept, adapters too."""
    from rich.table import Column, Table

    rows: dict[tuple[str, str], list[int]] = {}
    for kind, kept, number, size in _held(model):
        row = rows.setdefault((kind, kept), [0, 0])
        row[0], row[1] = row[0] + number, row[1] + size
    columns = ("weights", "bytes", "bits each")
    shown = Table("held by", "kept as", *(Column(one, justify="right") for one in columns))
    for (kind, kept), (number, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        shown.add_row(kind, kept, f"{number:,}", f"{size:,}", f"{8 * size / number:.2f}")
    number, size = (sum(row[index] for row in rows.values()) for index in (0, 1))
    bits = f"{8 * size / number:.2f}"
    shown.add_row("together", "", f"{number:,}", f"{size:,}", bits, style="bold")
    return shown


def _held(model: nn.Module) -> Iterable[tuple[str, str, int, int]]:
    """Class, form, number and bytes of every weight; a weight of two modules counts once."""
    met: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        for stack in stacks_in(module).values():
            yield kind, stack.quant_type, stack.shape.numel(), stack.nbytes
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in met or weight.numel() == 0:
                continue
            met.add(id(weight))
            if name == "weight" and is_packed_linear(module):
                number = module.in_features * module.out_features
                yield kind, weight.quant_type, number, weight_bytes(module)
            else:
                dtype = str(weight.dtype).removeprefix("torch.")
                yield kind, dtype, weight.numel(), weight.nbytes


def _left(model: nn.Module, settings: FourBitSettings) -> set[str]:
    """The modules that stay as they are: routers, output heads, and what the recipe names."""
    kept = {id(module) for module in (*recorded_routers(model).values(), *heads(model))}
    names = {name for name, module in model.named_modules() if id(module) in kept}
    return names | _named(model, settings.unquantised or ())


def _named(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The modules that patterns name by a dotted end of their name, as `lora_target_modules` do."""
    names = [name for name, _ in model.named_modules()]
    found = {one: {name for name in names if f".{name}".endswith(f".{one}")} for one in patterns}
    missing = [pattern for pattern, matched in found.items() if not matched]
    if missing:
        raise ValueError(f"unquantised: {missing[0]!r} is the end of no module's name")
    return set().union(*found.values())


def _within(name: str, blocks: Iterable[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _experts(model: nn.Module) -> tuple[dict[str, Experts], str]:
    """The experts that can be packed, and what stands in the way of others."""
    try:
        found = experts(model)
    except ValueError as error:
        return {}, str(error)
    able = {path: layout for path, layout in found.items() if runs_here(layout)}
    kinds = {type(one.module).__name__ for path, one in found.items() if path not in able}
    return able, f"{', '.join(kinds)} runs a forward of its own, which reads whole stacks"


def _refuse_unpacked(model: nn.Module, allowed: set[str], obstacle: str) -> None:
    left = {name: size for name, size in _stack_bytes(model).items() if not _within(name, allowed)}
    packed = sum(
        module.packed.shape.numel() * module.packed.dtype.itemsize
        for module in model.modules()
        if isinstance(module, QuantisedStack)
    )
    share = sum(left.values()) / max(packed + sum(left.values()), 1)
    if share > _MOST_LEFT:
        raise ValueError(
            f"load_in_4bit would leave {share:.0%} of the experts' bytes as they are, such as "
            f"{next(iter(left))}: {obstacle}. Name what may stay in 'model.unquantised', or choose "
            "another model."
        )


def _stack_bytes(model: nn.Module) -> Mapping[str, int]:
    """The stacks (E, ., .) of floats that are parameters, by name: convolutions are none."""
    return {
        f"{path}.{name}": weight.nbytes
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if _is_stack(weight) and not isinstance(module, nn.Conv1d)
    }


def _is_stack(weight: Tensor) -> bool:
    size = engine.shape(weight)
    return weight.is_floating_point() and len(size) == 3 and size[0] > 1
