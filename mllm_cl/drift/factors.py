"""The two factors of a low-rank expert W + s B A: what reaches B, and how far each may move.

Shape suffixes: D input width, O output width, R LoRA rank, K kept directions. Leading dimensions
"..." are empty or (E,), one per expert.
"""

import torch
from torch import Tensor

from mllm_cl.drift.guard import DriftGuard
from mllm_cl.drift.subspace import Spectrum, as_spectrum

__all__ = ["answer_energy", "low_rank_moment", "slow_a_within", "slow_b_within"]


def low_rank_moment(a_RD: Tensor, c: Spectrum) -> Tensor:
    """A C A^T (..., R, R): the second moment of what a LoRA B meets, from that of x.

    Beyond the kept directions C is taken as isotropic, with the trace that they leave over.
    """
    dtype = torch.promote_types(a_RD.dtype, c.basis_DK.dtype)
    a_RD, value_K = a_RD.to(dtype), c.eigenvalue_K.to(dtype)
    num_left = c.dim - value_K.shape[-1]
    rest = (c.trace.to(dtype) - value_K.sum(-1)).clamp_min(0) / max(num_left, 1)
    kept_RK = c.inner(a_RD)
    inside = (kept_RK * (value_K - rest[..., None])[..., None, :]) @ kept_RK.mT
    return inside + rest[..., None, None] * (a_RD @ a_RD.mT)


def answer_energy(weight_OD: Tensor, c: Spectrum) -> Tensor:
    """tr(W C W^T) over the kept directions of C: (...), float64."""
    felt_K = c.inner(weight_OD.double()).square().sum(-2)
    return (c.eigenvalue_K.double() * felt_K).sum(-1)


def slow_a_within(
    budget: float, c: Spectrum, energy: Tensor, *, b_OR: Tensor, step_RD: Tensor
) -> DriftGuard:
    """The least slowing of a step dA by which old inputs feel tr(X C X^T) <= budget/4 tr(W C W^T).

    X = s B dA, with the B of the task's start; `b_OR` is s B. As B' A' - B A = B dA + dB A', both
    steps together stay within `budget` whatever their angle if each keeps to a quarter of it. All
    traces are over the kept directions of C; `energy` is that of W (`answer_energy`), () or (E,).
    """
    # |B y| = |R y| for the triangular R of B = Q R: (R, D) in the place of (O, D).
    seen_RD = torch.linalg.qr(b_OR.double(), mode="r").R @ step_RD.double()
    c = _for_each(c, step_RD)
    return DriftGuard.slow(c, budget=budget / 4, weight=_stand_in(energy, c), delta=seen_RD)


def slow_b_within(
    budget: float, c: Spectrum, energy: Tensor, *, a_RD: Tensor, step_OR: Tensor
) -> DriftGuard:
    """The same for dB, X = s dB A', with the A' of the task's end; `step_OR` is s dB."""
    felt = as_spectrum(low_rank_moment(a_RD, c))
    return DriftGuard.slow(felt, budget=budget / 4, weight=_stand_in(energy, felt), delta=step_OR)


def _stand_in(energy: Tensor, c: Spectrum) -> Tensor:
    """A weight of one row (..., 1, D) with tr(W C W^T) = `energy`; zero where nothing was seen."""
    basis_DK, value = c.basis_DK.double(), c.eigenvalue_K[..., 0].double()
    vector_D1 = basis_DK[..., :1] if c.turn_KK is None else basis_DK @ c.turn_KK[..., :1].double()
    size = torch.where(value > 0, energy / value.clamp_min(_TINY), 0.0).sqrt()
    return size[..., None, None] * vector_D1.mT


_TINY = torch.finfo(torch.float64).tiny


def _for_each(c: Spectrum, step: Tensor) -> Spectrum:
    lead = step.shape[:-2]
    if c.turn_KK is not None:
        return c
    return Spectrum(
        c.basis_DK.expand(*lead, -1, -1), c.eigenvalue_K.expand(*lead, -1), c.trace.expand(lead)
    )
