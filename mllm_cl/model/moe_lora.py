"""Mixture of LoRA experts beside a frozen linear layer: CoIN's MoELoRA (arXiv:2403.08350) and the
adapter of SAME (arXiv:2602.01990): every token is routed by itself, by one rule at all times.
"""

# T tokens (any number of leading dimensions), D input width, O output width, E experts,
# R LoRA rank of one expert, S = E * R rows of all experts together.

import hashlib
from collections.abc import Mapping
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MoELoRA", "Router", "attach", "attach_moe_lora", "detach"]


class MoELoRA(nn.Module):
    """The sum of E low-rank updates, weighted for each token by a learned router.

        y = scale * sum_i w_i(x) B_i A_i x,   w(x) = softmax(W_G x),   scale = alpha / rank

    `rank` and `alpha` belong to one expert: the paper's setting is rank 8, alpha 16, hence scale 2
    (released code states the same as totals over the experts). A starts as N(0, 0.01^2), B at zero.
    With `top_k` the k largest weights are kept and renormalised, in training as in evaluation; at
    `top_k=1` the one weight is the constant 1, so the router receives no gradient.

    `lora_A` (E, R, D), `lora_B` (E, O, R) and `router.weight` (E, D) all end in the dimension of
    their input. Both GEMMs run in the input's dtype (autocast's, where that is on), whatever the
    dtype of the parameters; logits and softmax are at least fp32.

    `active` (None or a bool mask over experts) says who learns. Resting experts answer as before
    and pass gradients on to the input, but their own rows of `lora_A` and `lora_B` get a gradient
    of exactly zero that costs no GEMM; an optimizer's momentum may still move them. Their rows of
    the router keep learning. With `masks_routing` resting experts also leave the softmax and both
    GEMMs while training, and all of them answer in evaluation, as SAME has it (section "adaptive
    expert activation"); with one active expert the router then learns nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        rank: int,
        alpha: float,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1 or rank < 1:
            raise ValueError(
                f"MoELoRA needs at least one expert of rank 1 or more, "
                f"but got num_experts={num_experts} and rank={rank}."
            )
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k={top_k} does not fit {num_experts} experts: "
                f"use 1 to {num_experts}, or None for all of them."
            )
        # Kept as numbers: under ZeRO-3 the shape of a parameter is (0,) outside forward.
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.rank = num_experts, rank
        self.scale = alpha / rank
        self.top_k = top_k
        self.masks_routing = False
        self.active = None

        place = {"dtype": dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, in_features, **place))
        # Contiguous although the second GEMM wants (O, E, R): FSDP2 and safetensors refuse
        # parameters that are not. The reordering touches S/T of what the GEMM itself writes.
        self.lora_B = nn.Parameter(torch.empty(num_experts, out_features, rank, **place))
        self.router = Router(in_features, num_experts, bias=False, **place)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws A and the router anew, and sets B to zero.

        The draws are made in fp32 on the generator's own device, so that one seed gives the same
        adapter on every device and in every dtype up to rounding.
        """
        draw = torch.empty(self.lora_A.shape, device=generator.device if generator else "cpu")
        self.lora_A.copy_(draw.normal_(0.0, 0.01, generator=generator))  # SAME, "Model"
        self.lora_B.zero_()
        draw = draw.new_empty(self.router.weight.shape)
        bound = self.in_features**-0.5  # nn.Linear's own
        self.router.weight.copy_(draw.uniform_(-bound, bound, generator=generator))

    @property
    def active(self) -> Tensor | None:
        """The bool mask (E,) of the experts that learn; None: all do. Set it between steps."""
        return self._active_E

    @active.setter
    def active(self, mask: Tensor | None) -> None:
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (self.num_experts,)):
            raise ValueError(
                f"active must be a bool mask of {self.num_experts} experts, "
                f"but is {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if mask is not None and not mask.any():
            raise ValueError("active is false everywhere: at least one expert must learn.")
        self._active_E = None if mask is None or mask.all() else mask.clone()
        # Found here, once: nonzero() in forward would make the host wait for the device.
        self._active_index = None if self._active_E is None else self._active_E.nonzero()[:, 0]

    def route(self, input_TD: Tensor) -> Tensor:
        """The weights (T, E) of the experts for each token, at least fp32, each row summing to 1.

        Resting experts weigh 0 where they are masked out of routing.
        """
        self._move_active(input_TD.device)
        logits_TE = self.router(input_TD)
        if self._gathers():
            logits_TE = logits_TE.masked_fill(~self._active_E, float("-inf"))
        weight_TE = logits_TE.softmax(dim=-1, dtype=_wide(logits_TE.dtype))
        if self.top_k is None:
            return weight_TE
        kept = weight_TE.topk(self.top_k, dim=-1)
        kept_weight = kept.values / kept.values.sum(dim=-1, keepdim=True)
        return torch.zeros_like(weight_TE).scatter(-1, kept.indices, kept_weight)

    def forward(self, input_TD: Tensor) -> Tensor:
        """The adapters' answer (T, O), to be added to the frozen layer's."""
        dtype = _compute_dtype(input_TD)
        input_TD = input_TD.to(dtype)
        weight_TE = self.route(input_TD)
        # Read on every call: a guard puts effective tensors in their place for this forward.
        lora_A, lora_B, learners = self.lora_A, self.lora_B, self._active_index
        if self._gathers():
            lora_A = lora_A.index_select(0, learners)
            lora_B = lora_B.index_select(0, learners)
            weight_TE = weight_TE.index_select(-1, learners)
            learners = None

        A_SD = lora_A.to(dtype).flatten(0, 1)
        B_OS = lora_B.permute(1, 0, 2).to(dtype, memory_format=torch.contiguous_format).flatten(1)
        weight_TE = (self.scale * weight_TE).to(dtype)
        if learners is None:
            low_TS = _weigh(F.linear(input_TD, A_SD), weight_TE)
            return F.linear(low_TS, B_OS)
        rows = (learners[:, None] * self.rank + learners.new_tensor(range(self.rank))).flatten()
        low_TS = _weigh(_PartLinear.apply(input_TD, A_SD, rows, 0), weight_TE)
        return _PartLinear.apply(low_TS, B_OS, rows, 1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, rank={self.rank}, scale={self.scale:g}, "
            f"top_k={self.top_k}"
        )

    def _gathers(self) -> bool:
        return self.masks_routing and self.training and self._active_E is not None

    def _move_active(self, device: torch.device) -> None:
        # Attributes do not follow .to(device), as buffers would; this copies once per decision.
        if self._active_E is not None and self._active_E.device != device:
            self._active_E = self._active_E.to(device)
            self._active_index = self._active_index.to(device)


def attach(linear: nn.Linear, moe: MoELoRA) -> None:
    """Makes `linear(x)` answer with `linear(x) + moe(x)`, in the dtype of the former.

    The module stays in its place and keeps its class and its keys; the adapter becomes its
    submodule `moe_lora`. Whatever had replaced the instance's forward before is still called.
    Raises ValueError where an adapter is attached already or the widths differ.
    """
    if "moe_lora" in linear._modules:
        raise ValueError("This linear layer already has a MoELoRA: detach the first one before.")
    found = f"{moe.in_features} -> {moe.out_features}"
    expected = f"{linear.in_features} -> {linear.out_features}"
    if found != expected:
        raise ValueError(f"The adapter maps {found} features, but the linear layer {expected}.")
    linear.moe_lora = moe
    # Bound methods, not closures: deepcopy binds them to the copy.
    linear._forward_before_moe_lora = linear.forward
    linear.forward = MethodType(_forward_with_adapter, linear)


def detach(linear: nn.Linear) -> MoELoRA:
    """The adapter taken off again; `linear` is as it was before `attach`.

    Raises ValueError where there is none, or where forward was replaced once more after `attach`.
    """
    if "moe_lora" not in linear._modules:
        raise ValueError("This linear layer has no MoELoRA to detach.")
    if linear.forward != MethodType(_forward_with_adapter, linear):
        raise ValueError(
            "Something replaced this layer's forward after the MoELoRA was attached: "
            "take that off first."
        )
    previous = linear._forward_before_moe_lora
    if previous == MethodType(type(linear).forward, linear):
        del linear.forward
    else:
        linear.forward = previous
    moe = linear.moe_lora
    del linear.moe_lora, linear._forward_before_moe_lora
    return moe


def attach_moe_lora(
    model: nn.Module,
    names_to_linears: Mapping[str, nn.Linear],
    *,
    num_experts: int,
    rank: int,
    alpha: float,
    top_k: int | None = None,
    seed: int = 0,
) -> dict[str, MoELoRA]:
    """Qualified name -> the new fp32 adapter attached to that linear layer of `model`.

    Each adapter is drawn from (seed, qualified name) alone: the same on every rank, in any order
    and for any choice of the other layers. Raises ValueError where a name is not the layer's own.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, linear in names_to_linears.items():
        if modules.get(name) is not linear:
            raise ValueError(
                f"'{name}' is not the name of this layer in the model. Adapters are drawn from "
                f"qualified names: pass those of model.named_modules()."
            )
    adapters = {}
    for name, linear in names_to_linears.items():
        adapters[name] = MoELoRA(
            linear.in_features,
            linear.out_features,
            num_experts=num_experts,
            rank=rank,
            alpha=alpha,
            top_k=top_k,
            device=linear.weight.device,
            generator=seeded(seed, name),
        )
        attach(linear, adapters[name])
    return adapters


def _forward_with_adapter(self: nn.Linear, input: Tensor) -> Tensor:
    output = self._forward_before_moe_lora(input)
    return output + self.moe_lora(input).to(output.dtype)


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each seed and name, the same in every process."""
    # hashlib, because hash() of a string differs from process to process.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _compute_dtype(input: Tensor) -> torch.dtype:
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def _weigh(low_TS: Tensor, weight_TE: Tensor) -> Tensor:
    low_TER = low_TS.unflatten(-1, (weight_TE.shape[-1], -1))
    return (low_TER * weight_TE.unsqueeze(-1)).flatten(-2)


class Router(nn.Linear):
    """A linear layer whose logits are at least fp32, without keeping an fp32 copy of its input."""

    def reset_parameters(self) -> None:
        """Leaves the weight alone: MoELoRA draws it from its own generator."""

    def forward(self, input: Tensor) -> Tensor:
        return _WideLogits.apply(input, self.weight)


class _WideLogits(torch.autograd.Function):
    """x W^T in at least fp32; saves x as it came, where autograd would save the copy of it.

    The copy would be twice as large as a bf16 x, which is nearly all that one LoRA saves; it lives
    for a slice of the tokens at a time. Gradients are formed in the dtype of x, as those of A are.
    """

    @staticmethod
    def forward(ctx, input_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(input_TD, weight_ED)
        dtype = _wide(input_TD.dtype)
        # Elements that stay in cache. measured: 27 -> 5.5 ms on a CPU, T 2048, D 4096; GPU: ours
        num_elements = 2**20 if input_TD.device.type == "cpu" else 2**23
        num_tokens = max(1, num_elements // input_TD.shape[-1])
        with torch.autocast(input_TD.device.type, enabled=False):
            weight_ED = weight_ED.to(dtype)
            if input_TD.dtype == dtype:
                return F.linear(input_TD, weight_ED)
            slices = _rows(input_TD).split(num_tokens)
            logits_TE = torch.cat([F.linear(part_TD.to(dtype), weight_ED) for part_TD in slices])
        return logits_TE.view(*input_TD.shape[:-1], weight_ED.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input_TD, weight_ED = ctx.saved_tensors
        grad_TE = grad_TE.to(input_TD.dtype)
        with torch.autocast(input_TD.device.type, enabled=False):
            grad_input = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_input = grad_TE @ weight_ED.to(input_TD.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (_rows(grad_TE).T @ _rows(input_TD)).to(weight_ED.dtype)
        return grad_input, grad_weight


class _PartLinear(torch.autograd.Function):
    """x W^T, with the gradient of W formed only for the slices `index` of its dimension `dim`."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(input, weight, index)
        ctx.dim = dim
        return F.linear(input, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight, index = ctx.saved_tensors
        with torch.autocast(input.device.type, enabled=False):
            grad_input = grad @ weight if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return grad_input, None, None, None
            sides = [_rows(grad), _rows(input)]
            sides[ctx.dim] = sides[ctx.dim].index_select(1, index)
            part = sides[0].T @ sides[1]
        grad_weight = torch.zeros_like(weight).index_copy_(ctx.dim, index, part)
        return grad_input, grad_weight, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
