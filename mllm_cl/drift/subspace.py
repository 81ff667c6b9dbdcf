"""Which directions inputs use: eigenpairs of a second moment; how they compare, merge and move.

Shape suffixes: D model width, K kept directions, E experts, S tasks. Leading dimensions "..." are
empty or (E,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading eigenpairs of a second moment C, and the whole of its trace.

    basis_DK (..., D, K): orthonormal columns, largest eigenvalue first; eigenvalue_K (..., K) >= 0;
    trace (...): of all of C, so that energy ratios keep their true denominator when K < D. With
    `turn_KK` (E, K, K), orthogonal, E experts share basis_DK (D, K) and the eigenvectors of each
    are the columns of basis_DK turn_KK, which need never be formed.
    """

    basis_DK: Tensor
    eigenvalue_K: Tensor
    trace: Tensor
    turn_KK: Tensor | None = None

    @property
    def dim(self) -> int:
        return self.basis_DK.shape[-2]

    def inner(self, rows_OD: Tensor) -> Tensor:
        """The rows (..., O, D) in the coordinates of the eigenvectors: (..., O, K)."""
        inner_OK = rows_OD @ self.basis_DK.to(rows_OD.dtype)
        return inner_OK if self.turn_KK is None else inner_OK @ self.turn_KK.to(rows_OD.dtype)

    def of(self, expert: int) -> Spectrum:
        """That of one of the experts that share a basis."""
        assert self.turn_KK is not None, "these do not share a basis"
        return Spectrum(
            self.basis_DK, self.eigenvalue_K[expert], self.trace[expert], self.turn_KK[expert]
        )

    def truncate(self, rank: int | None) -> Spectrum:
        """The `rank` largest eigenpairs; the trace stays that of all of C."""
        assert self.turn_KK is None, "a shared basis has no order of its own"
        return Spectrum(self.basis_DK[..., :rank], self.eigenvalue_K[..., :rank], self.trace)

    def to(self, device: torch.device | str) -> Spectrum:
        turn_KK = None if self.turn_KK is None else self.turn_KK.to(device)
        return Spectrum(
            self.basis_DK.to(device), self.eigenvalue_K.to(device), self.trace.to(device), turn_KK
        )


def spectrum(covariance_DD: Tensor, rank: int | None = None) -> Spectrum:
    """The eigenpairs of a second moment (..., D, D), largest first.

    Computed in float64 whatever comes in; float64 stays float64, anything narrower returns float32.
    ValueError if the matrix is not finite.
    """
    value_D, vector_DD = symmetric_eigen(covariance_DD)
    dtype = torch.promote_types(covariance_DD.dtype, torch.float32)
    trace = covariance_DD.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    return Spectrum(vector_DD.to(dtype), value_D.clamp_min(0).to(dtype), trace.to(dtype)).truncate(
        rank
    )


def as_spectrum(c: Spectrum | Tensor) -> Spectrum:
    """`c` itself if it is a Spectrum, else the eigenpairs of the covariance `c`."""
    return c if isinstance(c, Spectrum) else spectrum(c)


def symmetric_eigen(matrix_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and orthonormal eigenvectors of the symmetric part; float64."""
    if matrix_DD.dim() < 2 or matrix_DD.shape[-1] != matrix_DD.shape[-2]:
        raise ValueError(
            f"expected a square matrix or a batch of them, found shape {tuple(matrix_DD.shape)}."
        )
    if not matrix_DD.isfinite().all():
        raise ValueError(
            "the second moment holds NaN or infinity; check the inputs it was measured on."
        )
    symmetric_DD = matrix_DD.double()
    symmetric_DD = (symmetric_DD + symmetric_DD.mT) / 2
    try:
        value_D, vector_DD = torch.linalg.eigh(symmetric_DD)
    except torch.linalg.LinAlgError:
        value_D, vector_DD = _eigen_on_cpu(symmetric_DD)
    # Solvers on accelerators have returned non-orthonormal vectors for clustered eigenvalues
    # without an error.
    if not _orthonormal(vector_DD):
        value_D, vector_DD = _eigen_on_cpu(symmetric_DD)
        assert _orthonormal(vector_DD), "eigh on the CPU returned vectors that are not orthonormal"
    return value_D.flip(-1), vector_DD.flip(-1)


def _eigen_on_cpu(symmetric_DD: Tensor) -> tuple[Tensor, Tensor]:
    value_D, vector_DD = torch.linalg.eigh(symmetric_DD.cpu())
    return value_D.to(symmetric_DD.device), vector_DD.to(symmetric_DD.device)


def _orthonormal(vector_DD: Tensor, tolerance: float = 1e-8) -> bool:
    # ours: float64 solvers reach 1e-14; a basis that misses 1e-8 would show in fp32 guards.
    identity_DD = torch.eye(vector_DD.shape[-1], dtype=vector_DD.dtype, device=vector_DD.device)
    return bool(((vector_DD.mT @ vector_DD - identity_DD).abs() < tolerance).all())


def energy_rank(
    eigenvalue_K: Tensor,
    trace: Tensor,
    energy: float,
    *,
    units: Literal["eigenvalue", "paper"] = "eigenvalue",
) -> Tensor:
    """The smallest k whose leading directions hold `energy` of the total: (...) integers in 0..K.

    eigenvalue: sum_{i<=k} lambda_i / trace >= energy.
    paper:      sum_{i<=k} lambda_i^2 / sum_i lambda_i^2 >= energy (SAME, arXiv:2602.01990, whose
                sigma_i are the singular values of C). The denominator is over the kept K, the
                only ones known of a truncated C.
    K if the kept directions do not reach it; 0 if nothing was seen (total 0).
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share of the total and lies in (0, 1], found {energy}.")
    if units not in ("eigenvalue", "paper"):
        raise ValueError(f"units is 'eigenvalue' or 'paper', found {units!r}.")
    value_K = eigenvalue_K.double() ** (2 if units == "paper" else 1)
    total = value_K.sum(-1) if units == "paper" else trace.double()
    # Rounding must not turn "all the energy" into "also the directions that hold none".
    slack = 8 * torch.finfo(eigenvalue_K.dtype).eps
    missing_K = value_K.cumsum(-1) < (energy - slack) * total.unsqueeze(-1)
    k = (missing_K.sum(-1) + 1).clamp_max(value_K.shape[-1])
    return torch.where(total > 0, k, 0)


def principal_angles(first_DK: Tensor, second_DK: Tensor) -> Tensor:
    """The angles between two subspaces in radians, smallest first: (..., min(K, K')).

    From the cosines where the angle is large and from the sines where it is small; arccos alone
    loses half the digits.
    """
    if first_DK.shape[-1] < second_DK.shape[-1]:
        first_DK, second_DK = second_DK, first_DK
    inner_KK = first_DK.mT @ second_DK
    cosine_K = torch.linalg.svdvals(inner_KK).clamp(0, 1)
    sine_K = torch.linalg.svdvals(second_DK - first_DK @ inner_KK).clamp(0, 1).flip(-1)
    return torch.where(cosine_K**2 > 0.5, sine_K.asin(), cosine_K.acos())


def subspace_overlap(first_DK: Tensor, second_DK: Tensor) -> Tensor:
    """||U^T V||_F^2 / min(K, K'): 1 if one contains the other, 0 if they are orthogonal."""
    smaller = min(first_DK.shape[-1], second_DK.shape[-1])
    return (first_DK.mT @ second_DK).square().sum((-2, -1)) / max(smaller, 1)


def merge_spectra(
    first: Spectrum,
    first_count: Tensor | float,
    second: Spectrum,
    second_count: Tensor | float,
    rank: int | None = None,
) -> Spectrum:
    """The eigenpairs of (n C + n' C') / (n + n'), exact if those of C and C' are complete.

    Truncated spectra lose what they truncated; the trace stays exact. Merge trackers instead while
    you still have them.
    """
    dtype = torch.promote_types(first.basis_DK.dtype, second.basis_DK.dtype)
    device = first.basis_DK.device
    first_count = torch.as_tensor(first_count, dtype=torch.float64, device=device)
    second_count = torch.as_tensor(second_count, dtype=torch.float64, device=device)
    share = first_count / (first_count + second_count).clamp_min(torch.finfo(torch.float64).tiny)
    other = torch.where(first_count + second_count > 0, 1 - share, 0.0)
    scaled = torch.cat(
        [
            first.basis_DK.double()
            * (share.unsqueeze(-1) * first.eigenvalue_K.double()).sqrt().unsqueeze(-2),
            second.basis_DK.double()
            * (other.unsqueeze(-1) * second.eigenvalue_K.double()).sqrt().unsqueeze(-2),
        ],
        dim=-1,
    )
    basis_DJ, singular_J, _ = torch.linalg.svd(scaled, full_matrices=False)
    trace = share * first.trace.double() + other * second.trace.double()
    return Spectrum(basis_DJ.to(dtype), singular_J.square().to(dtype), trace.to(dtype)).truncate(
        rank
    )


def without(c: Spectrum, part: Spectrum, share: Tensor | float) -> Spectrum:
    """The eigenpairs of the positive part of C - share * P: what is left of old inputs when some no
    longer count. `share` (...) is the share of C's tokens that P stands for, in [0, 1].

    Exact if both spectra are complete. P may have been measured later than C and need not lie below
    it: directions where it is larger count as unused.
    """
    share = torch.as_tensor(share, dtype=torch.float64, device=c.trace.device)
    both = torch.cat([c.basis_DK.double(), part.basis_DK.double()], dim=-1)
    basis_DJ = torch.linalg.qr(both)[0]
    value_J, vector_JJ = symmetric_eigen(
        _seen_from(basis_DJ, c) - share[..., None, None] * _seen_from(basis_DJ, part)
    )
    value_J = value_J.clamp_min(0)
    dtype = c.basis_DK.dtype
    # What neither kept is in the traces only.
    tail = (c.trace.double() - c.eigenvalue_K.double().sum(-1)).clamp_min(0) * (1 - share)
    return Spectrum(
        (basis_DJ @ vector_JJ).to(dtype), value_J.to(dtype), (value_J.sum(-1) + tail).to(dtype)
    )


def _seen_from(basis_DJ: Tensor, c: Spectrum) -> Tensor:
    """Q^T C Q, of what a spectrum kept of C."""
    inner_JK = basis_DJ.mT @ c.basis_DK.double()
    return (inner_JK * c.eigenvalue_K.double().unsqueeze(-2)) @ inner_JK.mT


def energy_inside(basis_DK: Tensor, c: Spectrum | Tensor) -> Tensor:
    """tr(U^T C U) / tr C, the share of the inputs' energy in the span of U; 0 if C is 0.

    A truncated Spectrum gives a lower bound: what it did not keep counts as outside.
    """
    if isinstance(c, Spectrum):
        inner_KJ = basis_DK.mT @ c.basis_DK
        inside = (inner_KJ.square() * c.eigenvalue_K.unsqueeze(-2)).sum((-2, -1))
        total = c.trace
    else:
        inside = ((c @ basis_DK) * basis_DK).sum((-2, -1))
        total = c.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(total > 0, inside / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def trajectory(spectra: Sequence[Spectrum], directions: int | None = None) -> Tensor:
    """How the inputs move: tr(U_s^T C_t U_s) / tr C_t for tasks s (rows), t (columns): (S, S, ...).

    `directions`: use only that many leading directions of each U_s.
    """
    rows = [[energy_inside(s.basis_DK[..., :directions], t) for t in spectra] for s in spectra]
    return torch.stack([torch.stack(row) for row in rows])
