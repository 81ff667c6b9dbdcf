"""Gaussian discriminant analysis: classes of one covariance, told apart in closed form.

C classes, N features, T all classes so far, V feature width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl.model.heads import class_sums
from mllm_cl.model.ridge import square, triangle


@dataclass(frozen=True)
class Discriminant:
    """o_k = v P μ_k − ½ μ_kᵀ P μ_k − log T of unit features v, divided by the length of o; P is the
    precision of features around the means of their classes.

    What is kept of the past are the means, float64, and of a symmetric matrix its upper triangle,
    which is Σ (v − μ_y)(v − μ_y)ᵀ over all images so far, or P itself (`merged`, with `count` 0).
    """

    mean_TV: Tensor
    upper: Tensor
    count: int

    @classmethod
    def of(cls, features_NV: Tensor, label_N: Tensor, number: int) -> "Discriminant":
        """That of classes 0 to `number` − 1 of their features."""
        unit_NV = functional.normalize(features_NV.double().cpu(), dim=-1)
        sum_CV, count_C = class_sums(unit_NV, label_N, number)
        mean_CV = sum_CV / count_C[:, None]
        centred_NV = unit_NV - mean_CV[label_N.cpu()]
        return cls(mean_CV, triangle(centred_NV.T @ centred_NV), len(unit_NV))

    def joined(self, newer: "Discriminant") -> "Discriminant":
        """With later classes: as if all had come at once."""
        mean_TV = torch.cat([self.mean_TV, newer.mean_TV])
        return Discriminant(mean_TV, self.upper + newer.upper, self.count + newer.count)

    def merged(self, newer: "Discriminant") -> "Discriminant":
        """With later classes as the released code of ENGINE (arXiv:2503.08510) joins them: a mean
        of precisions by numbers of classes, K of T old, and the spread of both sides' means,

            P = K/T P_old + (T−K)/T P_new + K (T−K) / T³ Δ Δᵀ,  Δ = mean μ_old − mean μ_new.
        """
        old, total = len(self.mean_TV), len(self.mean_TV) + len(newer.mean_TV)
        apart_V = self.mean_TV.mean(0) - newer.mean_TV.mean(0)
        share, spread = old / total, torch.outer(apart_V, apart_V)
        precision_VV = share * self.precision + (1 - share) * newer.precision
        precision_VV += share * (total - old) / total**2 * spread
        mean_TV = torch.cat([self.mean_TV, newer.mean_TV])
        return Discriminant(mean_TV, triangle(precision_VV), 0)

    @property
    def precision(self) -> Tensor:
        """P (V, V) = V ((n − 1) S + tr(S) I)⁻¹, S the covariance of all n images: as in Wang et
        al., "A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation", arXiv:2402.04087.
        """
        width = self.mean_TV.shape[1]
        matrix_VV = square(self.upper, width)
        if not self.count:
            return matrix_VV
        matrix_VV.diagonal().add_(matrix_VV.trace() / max(self.count - 1, 1))
        return width * torch.linalg.pinv(matrix_VV, hermitian=True)

    def weights(self) -> tuple[Tensor, Tensor]:
        """W (T, V) and b (T,) with o = W v + b."""
        weight_TV = self.mean_TV @ self.precision
        bias_T = -math.log(len(self.mean_TV)) - (weight_TV * self.mean_TV).sum(-1) / 2
        return weight_TV, bias_T

    def tensors(self) -> dict[str, Tensor]:
        """What has to be remembered."""
        return {"mean": self.mean_TV, "upper": self.upper, "count": torch.tensor(self.count)}

    @classmethod
    def restored(cls, known: Mapping[str, Tensor]) -> "Discriminant":
        """From what `tensors` gave."""
        return cls(known["mean"], known["upper"], int(known["count"]))
