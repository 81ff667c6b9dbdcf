"""A ridge regression on random features, learnt from sums: no gradient, no order of samples.

B batch, C classes, D feature width, M random features, N samples.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.model.heads import Head, cosines
from mllm_cl.model.moe_lora import seeded

PENALTIES = tuple(10.0**power for power in range(8, -9, -1))  # the released code's, largest first
AT_ONCE = 1024  # samples whose random features are there together
JUDGED = 4000  # images, at most, that λ is chosen with. ours: an eigendecomposition of more is long


class Features(Protocol):
    """The features (N, D) and labels (N,) of a set, the same on every process."""

    def whole(self) -> tuple[Tensor, Tensor]: ...


class Ridge(Head):
    """logits = W h with h = relu(f R), W = (G + λ I)⁻¹ Q, G = Σ h hᵀ and Q = Σ h yᵀ over all
    samples so far, y one-hot; `normalised`: logits = cos(h, W_c).

    R (D, M) is drawn from N(0, 1) by the seed, again in every process and task. G and Q are sums in
    float64, so the head depends neither on batches nor on processes nor on the order of samples;
    they stay on the CPU, as does what is computed with them. λ is the one of `PENALTIES` with the
    least squared error on a fifth of the newest task's samples, learnt from the others (drawn from
    the seed). Not tried is what is below 1e-10 of G's trace: the rounding of a sum would show.
    """

    def __init__(
        self, width: int, *, dim: int = 10_000, normalised: bool = False, seed: int = 0
    ) -> None:
        super().__init__(width)
        self.dim, self.normalised, self.seed = dim, normalised, seed
        draws_DM = torch.randn(width, dim, generator=seeded(seed, "projection"))
        self.projection_DM = draws_DM.double()
        self.gram = torch.zeros(dim * (dim + 1) // 2, dtype=torch.float64)  # its upper triangle
        self.cross_CM = torch.zeros(0, dim, dtype=torch.float64)
        self.penalty = PENALTIES[0]
        self._weight_CM: Tensor | None = None

    def grow(self, number: int) -> None:
        """Places for classes of which no sample was seen yet."""
        super().grow(number)
        self.cross_CM = torch.cat([self.cross_CM, self.cross_CM.new_zeros(number, self.dim)])
        self._weight_CM = None

    @torch.no_grad()
    def learn(self, number: int, batches: Features) -> dict[str, Tensor]:
        """Grow by `number` classes, add their samples, choose λ anew, and return what has to be
        remembered of all classes. Collective.
        """
        self.grow(number)
        features_ND, labels_N = batches.whole()
        mine = slice(engine.rank(), None, engine.world_size())
        gram_MM, cross_CM = self.projection_DM.new_zeros(self.dim, self.dim), self.cross_CM * 0
        parts = features_ND[mine].split(AT_ONCE), labels_N[mine].cpu().split(AT_ONCE)
        for features_BD, labels_B in zip(*parts, strict=True):
            hidden_BM = self.hidden(features_BD)
            gram_MM.addmm_(hidden_BM.mT, hidden_BM)
            cross_CM.index_add_(0, labels_B, hidden_BM)
        self.gram += engine.sum_over_ranks(triangle(gram_MM))
        self.cross_CM += engine.sum_over_ranks(cross_CM)
        found = [self._chosen(features_ND, labels_N - self.old)] if engine.rank() == 0 else []
        (self.penalty,) = engine.gather(found)
        return {
            "gram": self.gram,
            "cross": self.cross_CM,
            "penalty": torch.tensor(self.penalty, dtype=torch.float64),
            "drawn": self._drawn,
        }

    def restore(self, known: Mapping[str, Tensor]) -> None:
        """Go on from what `learn` returned. ValueError where it was made with another R or M."""
        same = known["drawn"].shape == self._drawn.shape and known["gram"].shape == self.gram.shape
        if not (same and torch.allclose(known["drawn"], self._drawn, atol=1e-5)):
            raise ValueError(
                f"the memory was made with another random projection than the seed {self.seed} "
                f"draws here from {self.width} to {self.dim} numbers: go back to the recipe's seed "
                "and dim, and to the version of torch that made it"
            )
        self.grow(len(known["cross"]))
        self.gram, self.cross_CM = known["gram"].clone(), known["cross"].clone()
        self.penalty = float(known["penalty"])

    def hidden(self, features_BD: Tensor) -> Tensor:
        """relu(f R) (B, M), float64, on the CPU."""
        return (features_BD.double().cpu() @ self.projection_DM).relu()

    @property
    def weight_CM(self) -> Tensor:
        """W, by Cholesky; kept until something is learnt."""
        if self._weight_CM is None:
            gram_MM = square(self.gram, self.dim)
            gram_MM.diagonal().add_(self.penalty)
            factor_MM = torch.linalg.cholesky(gram_MM)
            self._weight_CM = torch.cholesky_solve(self.cross_CM.mT, factor_MM).mT
        return self._weight_CM

    def logits(self, features_BD: Tensor) -> Tensor:
        """W h, or cos(h, W_c)."""
        hidden_BM = self.hidden(features_BD)
        rule = cosines if self.normalised else nn.functional.linear
        return rule(hidden_BM, self.weight_CM).to(features_BD)

    @property
    def _drawn(self) -> Tensor:
        """A few numbers of R, that tell whether it is the one with which sums were made."""
        return self.projection_DM[0, :8].clone()

    def _chosen(self, features_ND: Tensor, labels_N: Tensor) -> float:
        """The best λ for samples of the newest classes, in one decomposition for all."""
        order = torch.randperm(len(labels_N), generator=seeded(self.seed, f"held out {self.old}"))
        held, learnt = order.split([-(-len(order) // 5), len(order) * 4 // 5])
        learnt = learnt[:JUDGED]
        hidden_NM, right_NC = self.hidden(features_ND[learnt]), one_hot(labels_N[learnt], self)
        left_HM, truth_HC = self.hidden(features_ND[held]), one_hot(labels_N[held], self)
        if len(learnt) <= self.dim:  # the same answers, from the smaller of two matrices
            gram, left = hidden_NM @ hidden_NM.mT, left_HM @ hidden_NM.mT
        else:
            gram, left, right_NC = hidden_NM.mT @ hidden_NM, left_HM, hidden_NM.mT @ right_NC
        values, vectors = torch.linalg.eigh(gram)
        left, right = left @ vectors, vectors.mT @ right_NC
        least = 1e-10 * float(diagonal(self.gram, self.dim).sum())
        tried = [penalty for penalty in PENALTIES if penalty >= least] or [PENALTIES[0]]
        errors = [
            float(((left / (values.clamp(min=0) + penalty)) @ right - truth_HC).square().mean())
            for penalty in tried
        ]
        return tried[errors.index(min(errors))]


def one_hot(labels_N: Tensor, head: Head) -> Tensor:
    """(N, C) of the newest classes, float64; labels count from the first of them."""
    return nn.functional.one_hot(labels_N.cpu(), head.number - head.old).double()


def triangle(matrix_MM: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row after row: M (M + 1) / 2 numbers."""
    return torch.cat([row[index:] for index, row in enumerate(matrix_MM)])


def square(triangle: Tensor, dim: int) -> Tensor:
    """The symmetric matrix (M, M) of which `triangle` is the upper part."""
    matrix_MM = triangle.new_zeros(dim, dim)
    for row, part in zip(matrix_MM, triangle.split(list(range(dim, 0, -1))), strict=True):
        row[dim - len(part) :] = part
    lower_MM = matrix_MM.mT.tril(-1)
    return matrix_MM.add_(lower_MM)


def diagonal(triangle: Tensor, dim: int) -> Tensor:
    """The diagonal (M,) of that matrix."""
    return torch.stack([part[0] for part in triangle.split(list(range(dim, 0, -1)))])
