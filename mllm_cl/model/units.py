"""Linears beside a frozen model of which each task adds one: what they give is added up, so that
together they are one linear.

D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl.model.moe_lora import seeded


def unit(width: int, *, bound: float, seed: int, name: str) -> nn.Linear:
    """A linear from and to `width`, drawn from U(−bound, bound) by the seed and its own name."""
    layer = nn.Linear(width, width)
    for part, one in layer.named_parameters():
        nn.init.uniform_(one, -bound, bound, generator=seeded(seed, f"{name}.{part}"))
    return layer


def still(x: Tensor) -> Tensor:
    """x with the gradient zero, on every engine: of a step of SGD it feels the weight decay alone,
    as what was frozen by hand did before torch 2, whose `zero_grad` left zeros behind.
    """
    return x.detach() + 0 * x


def merged(layers: Sequence[nn.Linear], *, fading: bool = False) -> tuple[Tensor, Tensor]:
    """The one weight (D, D) and bias (D,) that do what all of them do; `fading`: all but the last
    are `still`.
    """
    parts = [(layer.weight, layer.bias) for layer in layers]
    if fading:
        parts[:-1] = [(still(weight), still(bias)) for weight, bias in parts[:-1]]
    # A bare sum would hand one tensor to all as their gradient, and what clips or accumulates in
    # place would do it once for each.
    weight_DD, bias_D = ((torch.stack(every) * 1.0).sum(0) for every in zip(*parts, strict=True))
    return weight_DD, bias_D


def injected(layers: Sequence[nn.Linear], x: Tensor, *, fading: bool = False) -> Tensor:
    """The sum of what they give."""
    return functional.linear(x, *(one.to(x.dtype) for one in merged(layers, fading=fading)))
