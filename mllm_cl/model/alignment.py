"""Aligning a linear head: trained once more on features drawn from a Gaussian of every class.

B batch, C classes, D feature width, N features, T tasks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl.model.heads import Linear
from mllm_cl.model.moe_lora import seeded


class Aligned(Linear):
    """Linear, and where it answers with the aligned weights if there are any: training goes on with
    its own.
    """

    def __init__(self, width: int, number: int = 0, *, seed: int = 0) -> None:
        super().__init__(width, number, seed=seed)
        self.aligned: tuple[Tensor, Tensor] | None = None

    def logits(self, features_BD: Tensor) -> Tensor:
        """W φ + b, of the aligned W and b outside of training."""
        if self.training or self.aligned is None:
            return super().logits(features_BD)
        return functional.linear(features_BD, *(one.to(features_BD) for one in self.aligned))


def gaussian(features_ND: Tensor, *, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) + ridge I of features, float64; of one feature, ridge I."""
    features_ND = features_ND.double()
    mean_D, centred_ND = features_ND.mean(0), features_ND - features_ND.mean(0)
    cov_DD = centred_ND.T @ centred_ND / max(len(features_ND) - 1, 1)
    return mean_D, cov_DD + ridge * torch.eye(len(mean_D), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a head is aligned: `epochs` of SGD with momentum 0.9 at `rate`, lowered by a cosine from
    epoch to epoch, on `number` features of every class, drawn anew in each epoch, in batches of
    `number`. In float64 and from the seed, so the same on every process.
    """

    epochs: int
    rate: float
    number: int
    temperature: float
    weight_decay: float
    seed: int

    def of(
        self,
        head: tuple[Tensor, Tensor],
        gaussians: tuple[Tensor, Tensor],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The weights (C, D) and biases (C,) that begin as those of `head`, by the cross entropy of
        `normalised_logits`; `sizes` are the numbers of classes of each task.
        """
        weights = [one.detach().double().cpu().clone().requires_grad_() for one in head]
        optimizer = torch.optim.SGD(
            weights, lr=self.rate, momentum=0.9, weight_decay=self.weight_decay
        )
        mean_CD, cov_CDD = (one.double() for one in gaussians)
        factor_CDD = torch.linalg.cholesky(cov_CDD)
        for epoch in range(self.epochs):
            share = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            optimizer.param_groups[0]["lr"] = self.rate * share
            for features_BD, label_B in self._drawn(mean_CD, factor_CDD, epoch):
                logits_BC = functional.linear(features_BD, *weights)
                logits_BC = normalised_logits(logits_BC, sizes, self.temperature)
                optimizer.zero_grad()
                functional.cross_entropy(logits_BC, label_B).backward()
                optimizer.step()
        weight_CD, bias_C = (one.detach() for one in weights)
        return weight_CD, bias_C

    def _drawn(
        self, mean_CD: Tensor, factor_CDD: Tensor, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch's features and labels, in an order of its own."""
        generator = seeded(self.seed, f"aligned/{len(mean_CD)}/{epoch}")
        shape = (len(mean_CD), self.number, mean_CD.shape[1])
        draws_CND = torch.randn(shape, generator=generator, dtype=torch.float64)
        features_ND = (mean_CD[:, None] + draws_CND @ factor_CDD.mT).flatten(0, 1)
        order_N = torch.randperm(len(features_ND), generator=generator)
        for own_B in order_N.split(self.number):
            yield features_ND[own_B], own_B // self.number


def normalised_logits(logits_BC: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """logits / (temperature · mean over tasks of the length of a task's logits)."""
    tasks = logits_BC.split(list(sizes), dim=1)
    length_BT = torch.stack([own.norm(dim=1) for own in tasks], dim=1) + 1e-7
    return logits_BC / length_BT.mean(1, keepdim=True) / temperature
