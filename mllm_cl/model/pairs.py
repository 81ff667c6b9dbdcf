"""CLIP's loss of pairs of an image and a text, each of which is to find its other among all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl import engine


def pair_losses(
    image_BE: Tensor, text_BE: Tensor, label_B: Tensor | None, scale: Tensor | float
) -> Tensor:
    """CLIP's loss of each pair (B,) of vectors of length 1: the mean of both cross entropies, from
    its image to the texts and from its text to the images of all processes, by scale · product.

    Pairs of one label, captions of one image, are no negatives of one another; without labels all
    are. As many pairs come from each process; gradients find their way back, so that cutting a
    batch changes nothing. The next micro-batch of a step is another batch. Collective.
    """
    own_B = engine.rank() * len(image_BE) + torch.arange(len(image_BE), device=image_BE.device)
    ways = image_BE @ engine.gathered(text_BE).T, text_BE @ engine.gathered(image_BE).T
    label_N = None if label_B is None else engine.gathered(label_B)
    return _both([scale * way_BN for way_BN in ways], own_B, label_B, label_N)


def contrast(logits_NN: Tensor, label_N: Tensor | None = None) -> Tensor:
    """The same loss (N,) of the logits of every image with every text, of all processes already."""
    own_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return _both([logits_NN, logits_NN.T], own_N, label_N, label_N)


def _both(
    ways: Sequence[Tensor], own_B: Tensor, label_B: Tensor | None, label_N: Tensor | None
) -> Tensor:
    if label_B is not None:
        same_BN = (label_B[:, None] == label_N).scatter(1, own_B[:, None], False)
        ways = [way_BN.masked_fill(same_BN, -torch.inf) for way_BN in ways]
    return sum(functional.cross_entropy(one, own_B, reduction="none") for one in ways) / 2
