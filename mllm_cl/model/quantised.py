"""Stacks of fused experts in four bits, blockwise NF4 or FP4 by bitsandbytes: that packs the
weights of `nn.Linear` alone, and a sparse model is nearly all experts.
"""

# E experts, O output width, D input width, N = O D weights of one expert.

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mllm_cl import engine

BLOCK = 64  # weights under one scale, as in bitsandbytes' own layers
_SCALES = 256  # scales under one scale of their own, where these are quantised too


@dataclass(frozen=True)
class _Scales:
    """The largest magnitudes of all blocks, themselves in eight bits with an offset per expert."""

    offset_E: Tensor
    absmax: Tensor
    code: Tensor


@dataclass(frozen=True)
class Packed:
    """A frozen stack (E, O, D) in four bits, of which only one expert at a time is unpacked.

    `stack[e]` is that expert in the dtype that the stack had, `stack.mT` the same stack with every
    expert turned.
    """

    size: tuple[int, int, int]
    dtype: torch.dtype
    quant_type: str
    nibbles: Tensor  # (E, N / 2, 1), two weights a byte
    absmax: Tensor  # (E, N / BLOCK): fp32, or bytes under `scales`
    code: Tensor
    scales: _Scales | None
    turned: bool = False

    @property
    def shape(self) -> torch.Size:
        """(E, O, D), or (E, D, O) where it is turned."""
        first, *rest = self.size
        return torch.Size((first, *(reversed(rest) if self.turned else rest)))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.nibbles.device

    @property
    def mT(self) -> "Packed":  # noqa: N802 (torch's name)
        """The stack of the experts' transposes; nothing is copied."""
        return replace(self, turned=not self.turned)

    @property
    def nbytes(self) -> int:
        """All that is kept, scales included."""
        own = self.nibbles.nbytes + self.absmax.nbytes + self.code.nbytes
        more = vars(self.scales).values() if self.scales else ()
        return own + sum(tensor.nbytes for tensor in more)

    def __getitem__(self, expert: int) -> Tensor:
        """One expert's weight, unpacked."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        nested = {}
        if self.scales is not None:
            absmax, code = self.scales.absmax[expert], self.scales.code
            outer = QuantState(absmax=absmax, code=code, blocksize=_SCALES, dtype=torch.float32)
            nested = {"offset": self.scales.offset_E[expert], "state2": outer}
        state = QuantState(
            absmax=self.absmax[expert],
            shape=torch.Size(self.size[1:]),
            code=self.code,
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=self.dtype,
            **nested,
        )
        weight = dequantize_4bit(self.nibbles[expert], state)
        return weight.mT if self.turned else weight

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        scales = self.scales
        if scales is not None:
            scales = _Scales(*(tensor.to(device) for tensor in vars(scales).values()))
        moved = {name: vars(self)[name].to(device) for name in ("nibbles", "absmax", "code")}
        return replace(self, scales=scales, **moved)


@torch.no_grad()
def pack(stack_EOD: Tensor, *, quant_type: str = "nf4", nested: bool = False) -> Packed:
    """The stack in four bits, where it lies; `nested` quantises the scales too.

    Every expert is packed by itself: no block has weights of two. An accelerator, where there is
    one, does the work, and has one expert at a time.
    """
    from bitsandbytes.functional import quantize_4bit

    accelerated = torch.accelerator.is_available()
    place = torch.accelerator.current_accelerator() if accelerated else stack_EOD.device
    settings = {"blocksize": BLOCK, "quant_type": quant_type, "compress_statistics": nested}
    found = [quantize_4bit(one.to(place).contiguous(), **settings) for one in stack_EOD]
    states = [state for _, state in found]
    scales = None
    if nested:
        offset_E = torch.stack([state.offset for state in states])
        absmax = torch.stack([state.state2.absmax for state in states])
        scales = _Scales(offset_E, absmax, states[0].state2.code)
    return Packed(
        size=tuple(stack_EOD.shape),
        dtype=stack_EOD.dtype,
        quant_type=quant_type,
        nibbles=torch.stack([nibbles for nibbles, _ in found]),
        absmax=torch.stack([state.absmax for state in states]),
        code=states[0].code,
        scales=scales,
    ).to(stack_EOD.device)


class QuantisedStack(nn.Module):
    """What stands in a module where a parameter of this name stood.

    What it holds is frozen and made again from the base with every load, so it is neither parameter
    nor buffer: engines do not cast, broadcast or shard it, and no state dict has it.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Follow the model to its device, not to its dtype; `meta` would lose what is kept here.
        device = fn(torch.empty(0, device=self.packed.device)).device
        if device.type != "meta":
            self.packed = self.packed.to(device)
        return self

    def extra_repr(self) -> str:
        return f"{' x '.join(map(str, self.packed.size))}, {self.packed.quant_type}"


def replace_stack(module: nn.Module, name: str, packed: Packed) -> None:
    """Put a packed stack in the place of the parameter `name`, which is freed."""
    delattr(module, name)
    module.add_module(name, QuantisedStack(packed))


def stacks_in(module: nn.Module) -> dict[str, Packed]:
    """The packed stacks of a module itself, by the name of the parameter that each has replaced."""
    return {
        name: child.packed
        for name, child in module.named_children()
        if isinstance(child, QuantisedStack)
    }


def weight_of(module: nn.Module, name: str) -> Tensor | Packed:
    """The weight called `name` as a forward reads it: packed, or the tensor."""
    child = module._modules.get(name)
    return child.packed if isinstance(child, QuantisedStack) else getattr(module, name)


def whole(module: nn.Module, name: str) -> Tensor:
    """The weight called `name`, unpacked from whatever form, fp32. Collective under sharding."""
    weight = weight_of(module, name)
    if isinstance(weight, Packed):
        return torch.stack([weight[expert].float() for expert in range(weight.shape[0])])
    if is_packed_linear(module):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), weight.quant_state).float()
    return engine.full(module._parameters[name]).float()


def is_packed_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight bitsandbytes has packed."""
    return isinstance(module, nn.Linear) and "quant_state" in vars(module.weight)


def weight_bytes(module: nn.Module) -> int:
    """What a packed linear layer's weight takes, its scales included."""
    state = module.weight.quant_state
    parts = [module.weight, state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return sum(part.nbytes for part in parts)
