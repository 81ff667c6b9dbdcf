"""What a method puts into a frozen vision transformer: adapters, scales and shifts, prompts.

Each acts inside `forward`, as a child of the module that it changes, so that every engine gathers
and shards it like any other weight; keys, classes and places of the frozen weights stay. With
`unadapted` one copy of them answers as if nothing had been put in.
B batch, N tokens, D width, R rank of an adapter, P prompts.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetModel

from mllm_cl import engine
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.moe_lora import seeded


class Adaptation(nn.Module):
    """What was put beside frozen weights; while not `active` it leaves what it is given alone.

    Its parameters are fp32 in a model of any dtype, and act in the dtype of what they meet. What
    rests acts, but has the gradient zero for a while.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active, self.resting = True, False


class _Seen:
    """Carries the residual stream from the LayerNorm that it enters to the adapter beside the MLP.

    Both lie in one block, so checkpointing that runs the block anew brings a new one.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        value, self.value = self.value, None
        assert value is not None, "the MLP ran without the LayerNorm before it"
        return value


class Bottleneck(Adaptation):
    """AdaptFormer's adapter beside an MLP (arXiv:2205.13535): adds scale · U dropout(relu(D x)).

    x is the residual stream before the MLP's LayerNorm; the adapter has none of its own. U and both
    biases start at zero, so nothing changes at first. Several may stand beside one MLP.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        scale: float,
        dropout: float,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        place = {"dtype": torch.float32, "device": device}
        self.down_RD = nn.Parameter(torch.empty(rank, width, **place))
        self.down_R = nn.Parameter(torch.zeros(rank, **place))
        self.up_DR = nn.Parameter(torch.zeros(width, rank, **place))
        self.up_D = nn.Parameter(torch.zeros(width, **place))
        bound = width**-0.5  # kaiming_uniform with a = √5
        with torch.no_grad():
            self.down_RD.copy_(
                torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
            )

    def forward(self, branch_BND: Tensor, x_BND: Tensor) -> Tensor:
        """What the MLP answered, with the adapter's answer to x added."""
        if not self.active:
            return branch_BND
        dtype = x_BND.dtype
        low_BNR = functional.linear(x_BND, self.down_RD.to(dtype), self.down_R.to(dtype)).relu()
        low_BNR = functional.dropout(low_BNR, self.dropout, self.training)
        moved_BND = functional.linear(low_BNR, self.up_DR.to(dtype), self.up_D.to(dtype))
        return branch_BND + (self.scale * moved_BND).to(branch_BND.dtype)


class Scaling(Adaptation):
    """SSF (arXiv:2210.08823): y ← γ y + β over the channels, which lie in dimension `dim` of y."""

    def __init__(
        self, width: int, *, dim: int, device: torch.device, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.dim = dim
        draws = torch.empty(2, width).normal_(std=0.02, generator=generator)
        self.gamma_D = nn.Parameter((1 + draws[0]).to(device))
        self.beta_D = nn.Parameter(draws[1].to(device))

    def forward(self, y: Tensor) -> Tensor:
        """γ y + β, formed in fp32: in bf16 γ would round to a hundredth."""
        if not self.active:
            return y
        shape = [-1] + [1] * (-self.dim - 1)
        return (y * self.gamma_D.view(shape) + self.beta_D.view(shape)).to(y.dtype)


class Prompts(Adaptation):
    """Learnt tokens that join a sequence at its end (VPT, arXiv:2203.12119).

    At the end the class token keeps its place; to attention the place makes no difference. The
    paper draws them, too, and puts them after the class token; APER's released code has zeros at
    the end, where a LayerNorm has a gradient of 1 / √ε: 1e6 in a ViT of transformers.
    """

    def __init__(
        self, number: int, width: int, *, device: torch.device, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.number = number
        self.prompts_PD = nn.Parameter(drawn_prompts(number, width, generator=generator).to(device))

    def forward(self, hidden_BND: Tensor) -> Tensor:
        """The sequence, longer by the prompts."""
        if not self.active:
            return hidden_BND
        prompts_BPD = self.prompts_PD.to(hidden_BND.dtype).expand(len(hidden_BND), -1, -1)
        return torch.cat([hidden_BND, prompts_BPD], dim=1)

    def leave(self, hidden_BND: Tensor) -> Tensor:
        """The sequence without them."""
        return hidden_BND[:, : -self.number] if self.active else hidden_BND


def drawn_prompts(*size: int, generator: torch.Generator) -> Tensor:
    """Tokens of N(0, 0.02²), as embeddings of transformers begin."""
    return torch.empty(size).normal_(std=0.02, generator=generator)


class Tuned(Adaptation):
    """A copy of a module, which answers in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = deepcopy(module)

    def forward(self, *args, **kwargs):
        """What the copy answers."""
        return self.own(*args, **kwargs)


def attach_adapters(
    encoder: Encoder,
    *,
    rank: int = 64,
    scale: float = 0.1,
    dropout: float = 0.1,
    seed: int = 0,
    name: str = "bottleneck",
) -> dict[str, nn.Parameter]:
    """A bottleneck beside the MLP of every block; what trains, by name. No output changes a bit.

    Those of another `name` stand beside them and act, too, unless `show` says which do. Where a
    layer scale follows the MLP, as in DINOv2, the adapter's answer is not scaled by it.
    """
    anatomy, backbone = encoder.anatomy, encoder.backbone
    for block in anatomy.blocks:
        norm, branch = backbone.get_submodule(block.ln2), backbone.get_submodule(block.branch)
        bottleneck = Bottleneck(
            anatomy.width,
            rank,
            scale=scale,
            dropout=dropout,
            device=norm.weight.device,
            generator=seeded(seed, block.name),
        )
        _add(branch, name, bottleneck)
        if "_seen" not in vars(branch):
            branch._seen = norm._seen = _Seen()
            for module, forward in ((norm, _forward_seen), (branch, _forward_beside)):
                module._forward_before_seen = module.forward
                module.forward = MethodType(forward, module)
    return _trained(encoder, Bottleneck, name)


def attach_ssf(encoder: Encoder, *, seed: int = 0) -> dict[str, nn.Parameter]:
    """γ and β after the patches, every LayerNorm and every linear; what trains, by name.

    They are drawn around 1 and 0 with deviation 0.02, so the output moves a little. A ResNet has
    one of them, after its pooling, as in APER.
    """
    backbone = encoder.backbone
    for name, dim in _scaled(encoder).items():
        module = backbone.get_submodule(name)
        weight = module._parameters.get("weight")
        width = encoder.width if weight is None else engine.shape(weight)[0]
        device = next(backbone.parameters()).device
        scaling = Scaling(width, dim=dim, device=device, generator=seeded(seed, name))
        put(module, "ssf", scaling, _forward_with_ssf)
    return _trained(encoder, Scaling)


def _scaled(encoder: Encoder) -> dict[str, int]:
    """What SSF comes after, with the dimension of its channels."""
    if isinstance(encoder.backbone, ResNetModel):
        return {"pooler": -3}
    anatomy = encoder.anatomy
    found = {anatomy.patches: -3}
    for block in anatomy.blocks:
        parts = (block.ln1, block.q, block.k, block.v, block.o, block.ln2, block.fc1, block.fc2)
        found |= dict.fromkeys(parts, -1)
    return found | {anatomy.norm: -1}


def attach_prompts(
    encoder: Encoder, *, number: int = 5, deep: bool, seed: int = 0
) -> dict[str, nn.Parameter]:
    """`number` prompts before the first block, or new ones before every block if `deep`; what
    trains, by name.
    """
    anatomy, backbone = encoder.anatomy, encoder.backbone
    blocks = [backbone.get_submodule(block.name) for block in anatomy.blocks]
    place = {"device": next(backbone.parameters()).device}
    entering = blocks if deep else blocks[:1]
    for block, names in zip(entering, anatomy.blocks, strict=False):
        generator = seeded(seed, names.name)
        prompts = Prompts(number, anatomy.width, generator=generator, **place)
        put(block, "prompts", prompts, _forward_with_prompts)
    # In a tuple, so that the block in which they leave does not register them once more.
    for block in entering if deep else blocks[-1:]:
        block._forward_before_leaving = block.forward
        block._leaving = (block.prompts if deep else blocks[0].prompts,)
        block.forward = MethodType(_forward_and_leave, block)
    return _trained(encoder, Prompts)


def attach_copy(encoder: Encoder) -> dict[str, nn.Parameter]:
    """A second set of weights that answers in the place of the encoder's own, as full fine-tuning
    that keeps the original; what trains, by name. No output changes a bit.

    All that pictures pass through is in memory twice from here on, and the copy is part of every
    state: for a ViT-B/16 in fp32 343 MB each.
    """
    for module in encoder.seeing:
        put(module, "tuned", Tuned(module), _forward_tuned)
    found = _trained(encoder, Tuned)
    return {name: one for name, one in found.items() if not name.endswith("mask_token")}


def put(module: nn.Module, name: str, part: Adaptation, forward) -> None:
    """Make `part` a child of `module`, whose `forward` becomes the given one.

    Bound methods, not closures: deepcopy binds them to the copy.
    """
    _add(module, name, part)
    vars(module)[f"_forward_before_{name}"] = module.forward
    module.forward = MethodType(forward, module)


def _add(module: nn.Module, name: str, part: Adaptation) -> None:
    if name in module._modules:
        raise ValueError(f"this encoder has a {name} already: one of a kind is what it takes")
    module.add_module(name, part.train(module.training))


def _forward_seen(self: nn.LayerNorm, x_BND: Tensor) -> Tensor:
    self._seen.value = x_BND
    return self._forward_before_seen(x_BND)


def _forward_beside(self: nn.Module, normed_BND: Tensor) -> Tensor:
    x_BND, branch_BND = self._seen.take(), self._forward_before_seen(normed_BND)
    for part in self.children():
        if isinstance(part, Bottleneck):
            branch_BND = part(branch_BND, x_BND)
    return branch_BND


def _forward_tuned(self: nn.Module, *args, **kwargs):
    answers = self.tuned if self.tuned.active else self._forward_before_tuned
    return answers(*args, **kwargs)


def _forward_with_ssf(self: nn.Module, x: Tensor) -> Tensor:
    return self.ssf(self._forward_before_ssf(x))


def _forward_with_prompts(self: nn.Module, hidden_BND: Tensor, *args, **kwargs):
    refuse_mask(args[0] if args else kwargs.get("attention_mask"))
    return self._forward_before_prompts(self.prompts(hidden_BND), *args, **kwargs)


def refuse_mask(mask: Tensor | None) -> None:
    """ValueError for an attention mask, which fits no sequence that prompts have made longer."""
    if mask is not None:
        raise ValueError(
            "prompts make the sequence longer, which an attention mask does not fit; this "
            "attn_implementation makes one for pictures: choose 'sdpa' or 'eager'"
        )


def _forward_and_leave(self: nn.Module, *args, **kwargs):
    (prompts,) = self._leaving
    return prompts.leave(self._forward_before_leaving(*args, **kwargs))


def _trained(
    encoder: Encoder, kind: type[Adaptation], called: str | None = None
) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, module in encoder.named_modules()
        if isinstance(module, kind) and called in (None, path.rpartition(".")[2])
        for name, parameter in module.named_parameters()
    }


def adaptations(encoder: Encoder) -> list[tuple[str, Adaptation]]:
    """All that was put in, with what each is called where it is."""
    return [
        (path.rpartition(".")[2], module)
        for path, module in encoder.named_modules()
        if isinstance(module, Adaptation)
    ]


def resting(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are to train, but rest now."""
    modules = (one for one in model.modules() if isinstance(one, Adaptation) and one.resting)
    return [part for module in modules for part in module.parameters() if part.requires_grad]


@contextmanager
def acting(encoder: Encoder, names: Collection[str]) -> Iterator[None]:
    """Inside, of all that was put in what is called by one of `names` acts, and nothing else."""
    found = adaptations(encoder)
    before = [module.active for _, module in found]
    for name, module in found:
        module.active = name in names
    try:
        yield
    finally:
        for (_, module), active in zip(found, before, strict=True):
            module.active = active


def unadapted(encoder: Encoder) -> AbstractContextManager[None]:
    """Inside, the encoder answers with its frozen weights alone."""
    return acting(encoder, ())


def show(
    encoder: Encoder, parts: Mapping[str, Collection[str]], *, normalised: bool = False
) -> None:
    """Let the encoder answer with a feature for each of `parts`, side by side, in a pass each of
    one copy of the frozen weights, whose names stay: (B, D · parts).

    A part is what is put in and acts in its pass, by name. No feature is normalised, so in a cosine
    of all the longest counts for most; `normalised` makes them equal, which APER does not do.
    """
    encoder.width = encoder.width // len(encoder.parts) * len(parts)
    encoder.parts, encoder.shown = {name: tuple(own) for name, own in parts.items()}, tuple(parts)
    vars(encoder)["_parts_normalised"] = normalised
    encoder.forward = MethodType(_forward_parts, encoder)
    # And from here on: checkpointing runs blocks anew in backward, when no pass is under way.
    for name, module in adaptations(encoder):
        module.active = name in encoder.parts[encoder.shown[-1]]


def show_both(encoder: Encoder, *, normalised: bool = False) -> None:
    """Let the encoder answer with [φ_frozen; φ_adapted], (B, 2 D)."""
    own = {name for name, _ in adaptations(encoder)}
    show(encoder, {"frozen": (), "adapted": own}, normalised=normalised)


def _forward_parts(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    found = []
    for part in self.shown:
        with acting(self, self.parts[part]):
            feature_BD = type(self).forward(self, pixel_values_BCHW)
        unit = functional.normalize(feature_BD, dim=-1) if self._parts_normalised else feature_BD
        found.append(unit)
    return torch.cat(found, dim=-1)


@torch.no_grad()
def merge_ssf(encoder: Encoder) -> None:
    """Write every γ and β into the weights before it, W ← diag(γ) W and b ← γ b + β, and take SSF
    off: the output stays to rounding, and plain transformers can save the backbone. Collective.

    Raises ValueError, before anything is written, where there is no bias for β.
    """
    scaled = {name: encoder.backbone.get_submodule(name) for name in _scaled(encoder)}
    for name, module in scaled.items():
        if module._parameters.get("bias") is None:
            raise ValueError(
                f"{name} has no bias that could take up SSF's shift, so SSF cannot be merged into "
                f"{type(encoder.backbone).__name__}: keep it beside the weights"
            )
    for module in scaled.values():
        gamma_D, beta_D = engine.full(module.ssf.gamma_D), engine.full(module.ssf.beta_D)
        weight, bias_D = engine.full(module.weight).float(), engine.full(module.bias).float()
        shape = [-1] + [1] * (weight.dim() - 1)
        engine.write(module.weight, (weight * gamma_D.view(shape)).to(module.weight.dtype))
        engine.write(module.bias, (bias_D * gamma_D + beta_D).to(module.bias.dtype))
        _take(module, "ssf")


def _take(module: nn.Module, name: str) -> None:
    """Undo `put`, if nothing replaced the forward since."""
    before = vars(module).pop(f"_forward_before_{name}")
    delattr(module, name)
    if before == MethodType(type(module).forward, module):
        del module.forward
    else:
        module.forward = before
