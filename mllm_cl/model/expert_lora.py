"""LoRA on the fused experts of a natively sparse model: every token's experts answer with
W_e x + s B_e A_e x, and W + B A is never formed.

The adapters of all experts are two stacks per product, registered on the experts module itself:
every rank touches all of them at every step, whichever experts its tokens went to.
"""

# T tokens, K experts per token, N = T K pairs of a token and one of its experts, sorted by expert,
# D input width, I inner width, O output width, E experts, R LoRA rank of one expert.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mllm_cl import engine
from mllm_cl.model.experts import Experts
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.quantised import Packed, stacks_in, weight_of
from mllm_cl.model.surgery import installed_on

IMPLEMENTATION = "mllm_cl_expert_lora"


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a product are: row n is token `token_N[n]` at expert `expert_N[n]`.

    `weight_N` is what its answer is multiplied with; None where its input was (Llama 4), and where
    rows without a weight are all zero.
    """

    expert_N: Tensor
    token_N: Tensor
    num_tokens: int
    weight_N: Tensor | None

    def visited(self, input_ND: Tensor) -> tuple[Tensor, "Rows"]:
        """The inputs and rows of experts that were chosen: all, but for Llama 4."""
        if self.weight_N is not None:
            return input_ND, self
        chosen_N = input_ND.any(-1)
        rows = Rows(self.expert_N[chosen_N], self.token_N[chosen_N], self.num_tokens, None)
        return input_ND[chosen_N], rows


# What sees the input of both products: (stack name, input_ND, rows).
Observer = Callable[[str, Tensor, Rows], None]


@dataclass(eq=False)
class ExpertLoRA:
    """What one experts module has to know of its adapters; the weights are its own parameters.

    `observer`, while set, is called with the input of both products of every forward. Rank 0 has no
    adapters: frozen experts that run here since theirs are packed (`run_frozen`).
    """

    layout: Experts
    rank: int
    scale: float
    observer: Observer | None = None
    # The experts implementation that ran before, for whoever takes the adapters off again.
    previous: str | None = None


@dataclass(frozen=True)
class Groups:
    """Which of N sorted rows belong to which expert: those of e end where `ends_E[e]` says.

    `spans` are the same numbers on the host, where products run expert by expert. On a device that
    multiplies groups in one kernel (`grouped`) there are none, unless weights are packed, so that
    the host need not wait.
    """

    ends_E: Tensor
    grouped: bool
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, counts_E: Tensor, weight: Tensor | Packed) -> "Groups":
        """The groups of that many rows each, for products with stacks such as `weight`."""
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        grouped = _has_grouped_kernel(ends_E.device, weight.dtype)
        if grouped and torch.is_tensor(weight):
            return cls(ends_E, True, ())
        ends = ends_E.tolist()
        starts = [0, *ends[:-1]]
        spans = [(e, *span) for e, span in enumerate(zip(starts, ends, strict=True))]
        return cls(ends_E, grouped, tuple(span for span in spans if span[1] < span[2]))

    def product(self, input_ND: Tensor, weight_EDO: Tensor | Packed) -> Tensor:
        """x_n W_e(n): (N, O), in the wider of both dtypes.

        Of packed weights those of experts with rows are unpacked, one after another.
        """
        if self.grouped and torch.is_tensor(weight_EDO):
            return F.grouped_mm(input_ND, weight_EDO, offs=self.ends_E)
        dtype = torch.promote_types(input_ND.dtype, weight_EDO.dtype)
        out_NO = self._rows(input_ND.shape[0], weight_EDO.shape[-1], input_ND, dtype)
        # One expert's rows are widened at a time: they stay in the cache, all of them would not.
        for expert, start, end in self.spans:
            torch.mm(input_ND[start:end].to(dtype), weight_EDO[expert], out=out_NO[start:end])
        return out_NO

    def _rows(self, number: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for rows that are all written, or zeros where there are some of no expert, as
        there are none in a model as it comes.
        """
        taken = self.spans[-1][2] if self.spans else 0
        made = torch.empty if taken == number else torch.zeros
        return made(number, width, dtype=dtype, device=like.device)

    def add_product(self, input_ND: Tensor, weight_EDO: Tensor, out_NO: Tensor) -> Tensor:
        """`out_NO` with x_n W_e(n) added in place, rounded to its dtype."""
        if self.grouped:
            return out_NO.add_(self.product(input_ND, weight_EDO))
        for expert, start, end in self.spans:
            if input_ND.dtype == out_NO.dtype:
                out_NO[start:end].addmm_(input_ND[start:end], weight_EDO[expert])
            else:
                out_NO[start:end].add_(input_ND[start:end] @ weight_EDO[expert])
        return out_NO

    def outer(self, left_NO: Tensor, right_ND: Tensor) -> Tensor:
        """Sum over each expert's rows of l_n r_n^T: (E, O, D), zero for experts without rows; in
        the wider of both dtypes.
        """
        if self.grouped:
            return F.grouped_mm(left_NO.mT, right_ND, offs=self.ends_E)
        size = (len(self.ends_E), left_NO.shape[-1], right_ND.shape[-1])
        dtype = torch.promote_types(left_NO.dtype, right_ND.dtype)
        sum_EOD = left_NO.new_zeros(size, dtype=dtype)
        for expert, start, end in self.spans:
            left_ON, right_nD = left_NO[start:end].to(dtype).mT, right_ND[start:end].to(dtype)
            torch.mm(left_ON, right_nD, out=sum_EOD[expert])
        return sum_EOD


def attach_expert_lora(
    model: nn.Module, found: Mapping[str, Experts], *, rank: int, alpha: float, seed: int = 0
) -> None:
    """Put rank-R adapters beside both products of every experts module in `found`.

    A is drawn from (seed, qualified name) alone, uniform within 1 / sqrt(D) as PEFT draws it; B
    starts at zero: no output changes by more than rounding. Stacks `<name>_lora_A` (E, R, D) and
    `<name>_lora_B` (E, O, R), fp32, both ending in the dimension of their input whatever the
    layout of the base. Raises ValueError for families whose experts run neither through
    transformers' experts switch nor as one dense batch of all of them.
    """
    for path, layout in found.items():
        _refuse(path, layout)
    for path, layout in found.items():
        _add_stacks(layout, rank, seed, path)
    _take_over(
        model, {path: ExpertLoRA(layout, rank, alpha / rank) for path, layout in found.items()}
    )


def run_frozen(model: nn.Module, found: Mapping[str, Experts]) -> None:
    """Run these experts here, as they are and without adapters, whether packed or not.

    The families' own forwards read whole stacks. Weights get no gradient. Raises ValueError as
    `attach_expert_lora` does, which may follow.
    """
    for path, layout in found.items():
        _refuse(path, layout)
    _take_over(model, {path: ExpertLoRA(layout, 0, 0.0) for path, layout in found.items()})


def runs_here(layout: Experts) -> bool:
    """Whether the experts of a family can be run by the products of this file."""
    return layout.switched or layout.scales_input


def _take_over(model: nn.Module, found: Mapping[str, ExpertLoRA]) -> None:
    for lora in found.values():
        module = lora.layout.module
        vars(module)["expert_lora"] = lora
        if lora.layout.switched:
            lora.previous = module.config._experts_implementation
        else:
            module.forward = MethodType(_forward_all, module)
    if any(lora.layout.switched for lora in found.values()):
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward_routed)
        model.set_experts_implementation(IMPLEMENTATION)


def adapted(model: nn.Module) -> dict[str, ExpertLoRA]:
    """The experts modules that have adapters, by qualified name."""
    return {
        path: vars(module)["expert_lora"]
        for path, module in model.named_modules()
        if "expert_lora" in vars(module) and vars(module)["expert_lora"].rank
    }


def stacks(layout: Experts) -> tuple[tuple[str, int, int], ...]:
    """Name, input width and output width of both products."""
    up = layout.inner * (2 if layout.gated else 1)
    return (layout.up, layout.width, up), (layout.down, layout.inner, layout.width)


def _refuse(path: str, layout: Experts) -> None:
    if not runs_here(layout):
        raise ValueError(
            f"the experts at {path} ({type(layout.module).__name__}) run a forward of their own, "
            "which adapters cannot enter. Train other weights: lora_target_modules without "
            "experts, or routers alone."
        )


def _add_stacks(layout: Experts, rank: int, seed: int, path: str) -> None:
    module, num_experts = layout.module, layout.num_experts
    device = weight_of(module, layout.up).device
    for name, width, output in stacks(layout):
        draw = torch.empty(num_experts, rank, width)
        bound = width**-0.5
        draw.uniform_(-bound, bound, generator=seeded(seed, f"{path}.{name}"))
        first, second = draw.to(device), torch.zeros(num_experts, output, rank, device=device)
        module.register_parameter(f"{name}_lora_A", nn.Parameter(first))
        module.register_parameter(f"{name}_lora_B", nn.Parameter(second))


def _forward_routed(
    self: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """The experts of each token, weighted: what transformers calls an experts implementation."""
    lora = vars(self)["expert_lora"]
    num_experts, num_chosen = lora.layout.num_experts, index_TK.shape[-1]
    expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=expert_N.device)
    counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N, dtype=torch.int32))
    groups = Groups.of(counts_E, weight_of(self, lora.layout.up))
    places = Places(order_N // num_chosen, back_N, num_chosen)
    weight_N = weight_TK.reshape(-1)[order_N]
    rows = Rows(expert_N, places.token_N, len(hidden_TD), weight_N)
    answer_ND = _answer(self, lora, hidden_TD, places, groups, rows)
    return places.scatter(answer_ND * weight_N[:, None]).to(hidden_TD.dtype)


def _forward_all(self: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Llama 4: every expert gets all tokens, scaled by its weight for them, mostly by zero."""
    lora = vars(self)["expert_lora"]
    num_experts, device = lora.layout.num_experts, hidden_ND.device
    num_tokens = len(hidden_ND) // num_experts
    each = torch.full((num_experts,), num_tokens, dtype=torch.int32, device=device)
    expert_N = torch.arange(num_experts, device=device).repeat_interleave(num_tokens)
    token_N = torch.arange(num_tokens, device=device).repeat(num_experts)
    rows = Rows(expert_N, token_N, num_tokens, None)
    groups = Groups.of(each, weight_of(self, lora.layout.up))
    return _answer(self, lora, hidden_ND, None, groups, rows).to(hidden_ND.dtype)


@dataclass(frozen=True)
class Places:
    """Where sorted rows come from: row n is token `token_N[n]`; `back_N` undoes the sorting."""

    token_N: Tensor
    back_N: Tensor
    num_chosen: int

    def gather(self, input_TD: Tensor) -> Tensor:
        """Each token's input, once for each of its experts."""
        return input_TD.index_select(0, self.token_N)

    def scatter(self, input_ND: Tensor) -> Tensor:
        """The sum over each token's rows: in a fixed order, unlike index_add on a GPU."""
        rows_TKD = input_ND.index_select(0, self.back_N).unflatten(0, (-1, self.num_chosen))
        return rows_TKD.sum(1)


def _answer(
    self: nn.Module,
    lora: ExpertLoRA,
    hidden_TD: Tensor,
    places: Places | None,
    groups: Groups,
    rows: Rows,
) -> Tensor:
    """What each row's expert answers, unweighted (N, D)."""
    layout = lora.layout
    up_NO = _adapted_product(self, lora, layout.up, hidden_TD, places, groups, rows)
    if layout.biased:
        up_NO = up_NO + self._parameters[f"{layout.up}_bias"][rows.expert_N]
    inner_NI = _activate(self, layout, up_NO)
    down_ND = _adapted_product(self, lora, layout.down, inner_NI, None, groups, rows)
    if layout.biased:
        down_ND = down_ND + self._parameters[f"{layout.down}_bias"][rows.expert_N]
    return self.post_expert_norm(down_ND) if "post_expert_norm" in self._modules else down_ND


def _activate(self: nn.Module, layout: Experts, up_NO: Tensor) -> Tensor:
    if not layout.gated:
        return self.act_fn(up_NO)
    if layout.switched:
        return self._apply_gate(up_NO)
    gate_NI, up_NI = up_NO.chunk(2, dim=-1)
    return up_NI * self.act_fn(gate_NI)


def _adapted_product(
    self: nn.Module,
    lora: ExpertLoRA,
    name: str,
    input_TD: Tensor,
    places: Places | None,
    groups: Groups,
    rows: Rows,
) -> Tensor:
    if lora.observer is not None:
        seen_ND = input_TD if places is None else places.gather(input_TD)
        lora.observer(name, *rows.visited(seen_ND.detach()))
    # In the weights' dtype, as transformers' own grouped products: a cast of all experts would cost
    # more than they.
    weight = weight_of(self, name)
    dtype = weight.dtype
    if not lora.rank:
        with torch.autocast(input_TD.device.type, enabled=False):
            return _FrozenProduct.apply(
                input_TD.to(dtype), weight, lora.layout.transposed, places, groups
            )
    # Read on every call: a guard puts effective tensors in their place for this forward.
    A_ERD, B_EOR = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")
    if groups.grouped:
        A_ERD, B_EOR = _padded(A_ERD.to(dtype), B_EOR.to(dtype))
    with torch.autocast(input_TD.device.type, enabled=False):
        return _AdaptedProduct.apply(
            input_TD.to(dtype), weight, lora.layout.transposed, A_ERD, B_EOR, lora.scale, places,
            groups,
        )  # fmt: skip


def _padded(A_ERD: Tensor, B_EOR: Tensor) -> tuple[Tensor, Tensor]:
    # The grouped kernel reads rows of multiples of 16 bytes, in bf16 ranks of multiples of 8.
    missing = -A_ERD.shape[1] % 8
    if not missing:
        return A_ERD, B_EOR
    return F.pad(A_ERD, (0, 0, 0, missing)), F.pad(B_EOR, (0, missing))


class _AdaptedProduct(torch.autograd.Function):
    """W_e x + s B_e A_e x for rows sorted by expert, W frozen.

    Saves what came in, not the rows gathered from it, which are K times as large; gathering again
    in backward costs a copy. The products with A and B run in their dtype: fp32 where they go
    expert by expert, since bf16 products that thin cost twice as much on a CPU.
    """

    @staticmethod
    def forward(ctx, input_TD, weight, transposed, A_ERD, B_EOR, scale, places, groups) -> Tensor:
        input_ND = input_TD if places is None else places.gather(input_TD)
        weight_EDO = weight if transposed else weight.mT
        low_NR = groups.product(input_ND, A_ERD.mT).mul_(scale)
        output_NO = groups.product(input_ND, weight_EDO)
        # The weight itself, no view of it: ZeRO-3 and FSDP2 put its data back for backward.
        ctx.packed, kept = (weight, None) if isinstance(weight, Packed) else (None, weight)
        ctx.save_for_backward(input_TD, kept, A_ERD, B_EOR, low_NR)
        ctx.transposed, ctx.scale, ctx.places, ctx.groups = transposed, scale, places, groups
        return groups.add_product(low_NR, B_EOR.mT, output_NO)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        input_TD, kept, A_ERD, B_EOR, low_NR = ctx.saved_tensors
        weight = kept if ctx.packed is None else ctx.packed
        places, groups = ctx.places, ctx.groups
        grad_NO = grad_NO.contiguous()
        with torch.autocast(grad_NO.device.type, enabled=False):
            grad_NR = groups.product(grad_NO, B_EOR).mul_(ctx.scale)
            grad_A = grad_B = grad_input = None
            if ctx.needs_input_grad[4]:
                grad_B = groups.outer(grad_NO, low_NR)
            if ctx.needs_input_grad[3]:
                input_ND = input_TD if places is None else places.gather(input_TD)
                grad_A = groups.outer(grad_NR, input_ND)
            if ctx.needs_input_grad[0]:
                grad_input = groups.product(grad_NO, weight.mT if ctx.transposed else weight)
                grad_input = groups.add_product(grad_NR, A_ERD, grad_input)
                grad_input = grad_input if places is None else places.scatter(grad_input)
        return grad_input, None, None, grad_A, grad_B, None, None, None


class _FrozenProduct(torch.autograd.Function):
    """W_e x for rows sorted by expert, W frozen; saves nothing but the weight."""

    @staticmethod
    def forward(ctx, input_TD, weight, transposed, places, groups) -> Tensor:
        input_ND = input_TD if places is None else places.gather(input_TD)
        ctx.packed, kept = (weight, None) if isinstance(weight, Packed) else (None, weight)
        ctx.save_for_backward(kept)
        ctx.transposed, ctx.places, ctx.groups = transposed, places, groups
        return groups.product(input_ND, weight if transposed else weight.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        weight = kept if ctx.packed is None else ctx.packed
        with torch.autocast(grad_NO.device.type, enabled=False):
            turned = weight.mT if ctx.transposed else weight
            grad_input = ctx.groups.product(grad_NO.contiguous(), turned)
        return ctx.places.scatter(grad_input) if ctx.places else grad_input, None, None, None, None


@torch.no_grad()
def merge_expert_lora(model: nn.Module) -> None:
    """Write s B_e A_e into every expert's weight, and take the adapters off. Collective.

    Raises ValueError, before anything is written, for experts in four bits and for adapters with
    guards, whose displacements would be lost: `surgery.fold` comes first.
    """
    for path, lora in adapted(model).items():
        guarded = list(installed_on(lora.layout.module))
        if guarded:
            raise ValueError(
                f"the adapters of the experts at {path} have guards ({guarded[0]} ...), whose "
                "displacements merging would drop: fold them into the weights first "
                "(mllm_cl.model.surgery.fold)"
            )
        if stacks_in(lora.layout.module):
            raise ValueError(
                f"the experts at {path} are kept in four bits, which would round their adapters "
                "away: load the model without load_in_4bit, put the adapters back, and merge there"
            )
    for lora in adapted(model).values():
        module, layout = lora.layout.module, lora.layout
        for name, _, _ in stacks(layout):
            first = engine.full(module._parameters[f"{name}_lora_A"]).float()
            second = engine.full(module._parameters[f"{name}_lora_B"]).float()
            moved = lora.scale * (second @ first)
            weight = engine.full(module._parameters[name])
            moved = moved.mT if layout.transposed else moved
            engine.write(module._parameters[name], (weight.float() + moved).to(weight.dtype))
    for lora in adapted(model).values():
        _give_back(model, lora)


def _give_back(model: nn.Module, lora: ExpertLoRA) -> None:
    """The experts module as it was before `attach_expert_lora`."""
    module = lora.layout.module
    del vars(module)["expert_lora"]
    for name, _, _ in stacks(lora.layout):
        del module._parameters[f"{name}_lora_A"], module._parameters[f"{name}_lora_B"]
    if not lora.layout.switched:
        del module.forward
    elif module.config._experts_implementation == IMPLEMENTATION:
        model.set_experts_implementation(lora.previous)


def _has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.__version__ >= (2, 10)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
