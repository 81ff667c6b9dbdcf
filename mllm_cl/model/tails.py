"""Copies of an encoder's last blocks, one for each task, behind blocks that all of them share; and
the head that compares what they answer.

B batch, C classes, D width of one tail's feature, N tokens, T tails.
"""

from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Linear
from mllm_cl.model.vision import Tuned


def attach_tails(encoder: Encoder, number: int, *, blocks: int = 1) -> list[nn.Module]:
    """Let the encoder answer with `number` features side by side (B, T D): that of its own last
    `blocks` blocks with the norm, and CLIP's projection, behind them, and those of copies. The
    blocks before them run once. Returns the modules that the copies are children of.

    Raises ValueError where no block is left to share.
    """
    ends = _ends(encoder, blocks)
    _put_copies(encoder, ends, number, first=ends[0])
    encoder.forward = MethodType(_forward_side_by_side, encoder)
    return ends


def _put_copies(
    encoder: Encoder, ends: list[nn.Module], number: int, first: nn.Module | None = None
) -> None:
    names = [f"tail_{tail}" for tail in range(1, number + 1)]
    copies = [[Tuned(module) for _ in names[1:]] for module in ends]  # before any is put in
    for module, own in zip(ends, copies, strict=True):
        for name, copy in zip(names[1:], own, strict=True):
            module.add_module(name, copy)
        # In a tuple, so that the encoder does not become its own child.
        module._tails, module._forward_before_tails = (encoder, module is first), module.forward
        module.forward = MethodType(_forward_tails, module)
    encoder.width *= number
    encoder.parts = {names[0]: ()} | {name: (name,) for name in names[1:]}
    encoder.shown = tuple(names)


def attach_towers(encoder: Encoder, number: int, *, blocks: int = 0) -> list[nn.Module]:
    """Let the encoder answer pictures and texts alike with `number` features side by side (B, T D):
    that of its own last `blocks` blocks of each tower and of all behind them, and those of copies;
    0: of whole towers. What is shared runs once for each of them. Returns the modules that the
    copies are children of.

    Raises ValueError where there are no two towers, or no block is left to share.
    """
    ends = _ends_of_towers(encoder, blocks)
    _put_copies(encoder, ends, number)
    encoder.forward = MethodType(_forward_repeated, encoder)
    encoder.text = MethodType(_text_repeated, encoder)
    return ends


def _ends_of_towers(encoder: Encoder, blocks: int) -> list[nn.Module]:
    if not encoder.family.reads:
        problem = f"{type(encoder.backbone).__name__} has no text tower"
        raise ValueError(f"{problem}: choose a CLIP or SigLIP model")
    found: list[nn.Module] = []
    for name, tower in encoder.backbone.named_children():
        parts = dict(tower.named_children())
        if "encoder" not in parts:  # a projection
            found.append(tower)
            continue
        every = list(parts["encoder"].layers)
        if not 0 <= blocks < len(every):
            raise ValueError(
                f"found {blocks} blocks that every task has a copy of, expected less than the "
                f"{len(every)} that {name} has"
            )
        place = list(parts).index("encoder")
        before, behind = (
            list(parts.values())[part] for part in (slice(place), slice(place + 1, None))
        )
        found += [*(every[-blocks:] if blocks else [*before, *every]), *behind]
    return found


def _ends(encoder: Encoder, blocks: int) -> list[nn.Module]:
    anatomy, backbone = encoder.anatomy, encoder.backbone
    if not 1 <= blocks < len(anatomy.blocks):
        raise ValueError(
            f"found {blocks} blocks that every task has a copy of, expected 1 to "
            f"{len(anatomy.blocks) - 1}: {type(backbone).__name__} has {len(anatomy.blocks)}, and "
            "tasks share those before them"
        )
    names = [block.name for block in anatomy.blocks[-blocks:]] + [anatomy.norm]
    names += [name for name, _ in backbone.named_children() if name == "visual_projection"]
    return [backbone.get_submodule(name) for name in names]


def own_weights(module: nn.Module, tail: int) -> dict[str, nn.Parameter]:
    """The weights that one tail has of a module that `attach_tails` returned, by their names."""
    if tail > 1:
        return dict(module.get_submodule(f"tail_{tail}").own.named_parameters())
    return {name: one for name, one in module.named_parameters() if not name.startswith("tail_")}


def start_tail(encoder: Encoder, tail: int) -> None:
    """Let a tail go on from what the one before it has learnt. Collective."""
    for module in encoder.modules():
        if "_tails" in vars(module):
            before = own_weights(module, tail - 1)
            for name, one in own_weights(module, tail).items():
                engine.write(one, engine.full(before[name]))


def _answers(module: nn.Module, encoder: Encoder) -> Iterator:
    for name in encoder.shown:
        yield module._modules.get(name, module._forward_before_tails)


def _forward_tails(self: nn.Module, *args, **kwargs) -> Tensor:
    """Each tail answers its own part of the batch, which the first module makes of the pictures."""
    encoder, first = self._tails
    number = len(encoder.shown)
    if first:
        args = (args[0].repeat(number, *[1] * (args[0].dim() - 1)), *args[1:])
    rows = next(len(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    found = []
    for place, answer in enumerate(_answers(self, encoder)):
        part = partial(_part, rows=rows, number=number, place=place)
        own = {key: part(one) for key, one in kwargs.items()}
        found.append(answer(*map(part, args), **own))
    return torch.cat(found)


def _part(one: object, *, rows: int, number: int, place: int) -> object:
    """What of an argument goes with one part of a batch: a mask may be as long as all parts."""
    if not isinstance(one, Tensor) or len(one) != rows:
        return one
    return one.chunk(number)[place]


def _forward_side_by_side(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    features_BD = type(self).forward(self, pixel_values_BCHW)
    return torch.cat(features_BD.chunk(len(self.shown)), dim=1)


def _forward_repeated(self: Encoder, pixel_values_BCHW: Tensor) -> Tensor:
    return _forward_side_by_side(self, pixel_values_BCHW.repeat(len(self.shown), 1, 1, 1))


def _text_repeated(self: Encoder, input_ids_CL: Tensor) -> Tensor:
    number = len(self.shown)
    return torch.cat(type(self).text(self, input_ids_CL.repeat(number, 1)).chunk(number), dim=1)


class Expanding(Linear):
    """Linear on all features; while it trains, the newest feature alone also tells the new classes
    from each other and from all old ones:

        L = CE(W φ + b, y) + weight CE(W_a φ_T + b_a, y_a),  y_a = 0 if old, else y − old + 1

    The second term is there from `watch` on. Source: DER (arXiv:2103.16788), section 3.3.
    """

    def __init__(self, width: int, number: int = 0, *, seed: int = 0) -> None:
        super().__init__(width, number, seed=seed)
        self.auxiliary: nn.Module | None = None

    def watch(self, width: int, weight: float) -> None:
        """Have the last `width` numbers of a feature answer on their own, too."""
        self.weight_of_auxiliary = weight
        self.auxiliary = Linear(width, self.number - self.old + 1, seed=self.seed)

    def losses(self, features_BD: Tensor, labels_B: Tensor) -> Tensor | None:
        """Both terms of each sample (B,)."""
        if self.auxiliary is None:
            return None
        newest_BD = features_BD[:, -self.auxiliary.width :]
        newer_B = (labels_B - self.old + 1).clamp(min=0)
        own_B = functional.cross_entropy(self(features_BD), labels_B, reduction="none")
        aside_B = functional.cross_entropy(self.auxiliary(newest_BD), newer_B, reduction="none")
        return own_B + self.weight_of_auxiliary * aside_B

    def settled(self) -> Linear:
        """The head as it answers: no auxiliary, and the new classes' rows as long as the old ones'
        on average (weight alignment, arXiv:1911.07053). Collective.
        """
        head = Linear(self.width, seed=self.seed)
        head.number, head.old = self.number, self.old
        weight_CD, bias_C = engine.full(self.weight), engine.full(self.bias)
        if self.old:
            length_C = weight_CD.norm(dim=1)
            weight_CD[self.old :] *= length_C[: self.old].mean() / length_C[self.old :].mean()
        head.weight, head.bias = nn.Parameter(weight_CD), nn.Parameter(bias_C)
        return head.requires_grad_(False)
