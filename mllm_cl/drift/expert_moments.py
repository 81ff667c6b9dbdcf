"""What enters each expert of a layer: one second moment per expert, all in a basis they share.

Held as K x K Grams, 128 experts of width 2048 take 2.6 MB at K = 64 where their own bases would
take 67 MB. What the shared basis leaves out is known exactly from the traces (`captured_E`).
"""

# N rows, each for one expert, D width, K kept directions, J joint directions, E experts.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mllm_cl.drift.covariance import recomputing
from mllm_cl.drift.subspace import Spectrum, symmetric_eigen

# At most this many rows at once; ours: 128 MiB in fp32 at a width of 2048.
ROWS = 2**14


class ExpertMoments:
    """The sums U^T (sum_n x_n x_n^T) U, sum_n ||x_n||^2 and the count of each expert's inputs.

    `basis_DK` is orthonormal: the leading directions of what enters the layer. At K = D nothing is
    lost. Grams of one basis add over batches and ranks; `merge` finds a basis for two.
    """

    def __init__(self, basis_DK: Tensor, num_experts: int) -> None:
        rank = basis_DK.shape[-1]
        self.basis_DK = basis_DK.contiguous()
        self._gram_EKK = torch.zeros(num_experts, rank, rank, device=basis_DK.device)
        self._trace_E = torch.zeros(num_experts, dtype=torch.float64, device=basis_DK.device)
        self._count_E = torch.zeros_like(self._trace_E)

    @torch.no_grad()
    def update(self, input_ND: Tensor, expert_N: Tensor, *, mask_N: Tensor | None = None) -> None:
        """Add rows (N, D) and whose they are. Masked rows, and those not finite, do not count.

        Nothing is added while activation checkpointing recomputes a forward.
        """
        if recomputing():
            return
        # Several experts a token make many rows: their copies in fp32 stay few at a time.
        for start in range(0, len(input_ND), ROWS):
            part = slice(start, start + ROWS)
            self._add(input_ND[part], expert_N[part], None if mask_N is None else mask_N[part])

    def _add(self, input_ND: Tensor, expert_N: Tensor, mask_N: Tensor | None) -> None:
        with torch.autocast(input_ND.device.type, enabled=False):
            input_ND = input_ND.float()
            square_N = input_ND.square().sum(-1)
            keep_N = square_N.isfinite() if mask_N is None else mask_N & square_N.isfinite()
            expert_N, square_N = expert_N[keep_N], square_N[keep_N].double()
            inner_NK = input_ND[keep_N] @ self.basis_DK
        self._trace_E.index_add_(0, expert_N, square_N)
        counts_E = expert_N.bincount(minlength=len(self._count_E))
        self._count_E += counts_E
        parts = inner_NK[expert_N.argsort(stable=True)].split(counts_E.tolist())
        for gram_KK, part_NK in zip(self._gram_EKK, parts, strict=True):
            gram_KK.addmm_(part_NK.mT, part_NK)

    @property
    def count_E(self) -> Tensor:
        """How many rows each expert got, float64."""
        return self._count_E

    @property
    def captured_E(self) -> Tensor:
        """The share of each expert's input energy that the basis holds; 1 where it got none."""
        kept_E = self._gram_EKK.diagonal(dim1=-2, dim2=-1).sum(-1).double()
        return torch.where(self._trace_E > 0, kept_E / self._trace_E.clamp_min(_TINY), 1.0)

    def spectrum(self) -> Spectrum:
        """The eigenpairs of every expert's C within the basis; zero where it got no rows.

        Its trace is all of C's, so what the basis leaves out counts as isotropic or as unused, as
        whoever reads it decides.
        """
        return self._spectrum(self._gram_EKK.double())

    def without(self, part: ExpertMoments, share: Tensor | float) -> Spectrum:
        """The eigenpairs of the positive part of C_e - share * P_e, `part` in any basis.

        `share` is the share of C's rows that P stands for; the trace loses as much.
        """
        turn_KK = (self.basis_DK.mT @ part.basis_DK).double()
        scale_E = share * self._count_E / part._count_E.clamp_min(1)
        moved = turn_KK @ part._gram_EKK.double() @ turn_KK.mT
        gram_EKK = self._gram_EKK.double() - scale_E[:, None, None] * moved
        return self._spectrum(gram_EKK, left=1 - share)

    def _spectrum(self, gram_EKK: Tensor, left: Tensor | float = 1.0) -> Spectrum:
        count_E = self._count_E.clamp_min(1)
        value_EK, turn_EKK = symmetric_eigen(gram_EKK / count_E[:, None, None])
        value_EK = value_EK.clamp_min(0)
        kept_E = self._gram_EKK.diagonal(dim1=-2, dim2=-1).sum(-1).double()
        left_E = (self._trace_E - kept_E).clamp_min(0) / count_E
        trace_E = value_EK.sum(-1) + left * left_E
        return Spectrum(self.basis_DK, value_EK.float(), trace_E.float(), turn_EKK.float())

    def merge(self, other: ExpertMoments, rank: int) -> ExpertMoments:
        """Both together, in the `rank` leading directions of all experts of both."""
        joint_DJ = torch.linalg.qr(torch.cat([self.basis_DK, other.basis_DK], -1).double())[0]
        inner = [(joint_DJ.mT @ one.basis_DK.double(), one) for one in (self, other)]
        total_JJ = sum(u_JK @ one._directions() @ u_JK.mT for u_JK, one in inner)
        vector_JK = symmetric_eigen(total_JJ)[1][:, :rank]
        merged = ExpertMoments((joint_DJ @ vector_JK).float(), len(self._count_E))
        for u_JK, one in inner:
            turn_KK = (vector_JK.mT @ u_JK).float()
            merged._gram_EKK += turn_KK @ one._gram_EKK @ turn_KK.mT
            merged._trace_E += one._trace_E
            merged._count_E += one._count_E
        return merged

    def _directions(self) -> Tensor:
        """Each expert's Gram, brought to an energy of 1 a row: one with small inputs has as much
        say in the basis as one with large ones.
        """
        scale_E = self._count_E / self._trace_E.clamp_min(_TINY)
        return (scale_E[:, None, None] * self._gram_EKK.double()).sum(0)

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by its sum over ranks."""
        self._gram_EKK = all_reduce_sum(self._gram_EKK)
        self._trace_E = all_reduce_sum(self._trace_E)
        self._count_E = all_reduce_sum(self._count_E)

    def to(self, device: torch.device | str) -> ExpertMoments:
        """A copy on `device`."""
        state = {name: tensor.to(device) for name, tensor in self.state().items()}
        return ExpertMoments.from_state(state)

    def state(self) -> dict[str, Tensor]:
        """Everything that is kept, as tensors on the CPU."""
        tensors = {
            "basis": self.basis_DK,
            "gram": self._gram_EKK,
            "trace": self._trace_E,
            "count": self._count_E,
        }
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ExpertMoments:
        moments = cls(state["basis"], len(state["count"]))
        moments._gram_EKK = state["gram"].clone()
        moments._trace_E, moments._count_E = state["trace"].clone(), state["count"].clone()
        return moments


_TINY = torch.finfo(torch.float64).tiny
