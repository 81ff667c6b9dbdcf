"""What enters a module: its count-weighted, uncentred second moment, in full or as a sketch.

C = sum_t w_t x_t x_t^T / sum_t w_t (SAME, arXiv:2602.01990 eq. 3). We keep the two sums: they add
over batches, ranks and tasks, so trackers merge exactly.

Shape suffixes: T tokens, D model width, E experts, S columns of the product (D when full), G a
group of experts. Leading dimensions "..." are empty or (E,) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mllm_cl.drift.subspace import Spectrum, spectrum, symmetric_eigen


def recomputing() -> bool:
    """Whether activation checkpointing runs a forward again, which happens inside backward."""
    return torch._C._current_graph_task_id() != -1


def sketch_width(dim: int, rank: int | None) -> int:
    """S, the columns that are kept of a second moment (D, D) whose `rank` leading directions count.

    S near 2 K bounds the expected error of the rank-K Nystrom approximation by about twice the
    optimum in the trace norm (arXiv:1706.05736, thm 4.1); the factor is ours.
    """
    return dim if rank is None else min(dim, rank + max(rank, 8))


class CovarianceTracker:
    """The sums behind C @ Omega, tr C and the count of what enters a module, or each expert.

    Full (`rank` None): Omega is the identity. Sketch: Omega is Gaussian (D, S), S = rank +
    max(rank, 8), a function of (seed, D, S) alone, so that every rank and every task sketches
    alike. A sketch as wide as D is kept in full. With `num_experts` every sum has a leading
    dimension E and each token counts with its weight for each expert.
    """

    def __init__(
        self, dim: int, *, rank: int | None = None, num_experts: int | None = None, seed: int = 0
    ) -> None:
        if any(number is not None and number < 1 for number in (dim, rank, num_experts)):
            raise ValueError(
                f"dim, rank, num_experts must be positive, found {dim}, {rank}, {num_experts}."
            )
        self.dim, self.rank, self.num_experts, self.seed = dim, rank, num_experts, seed
        width = sketch_width(dim, rank)
        self._omega_DS = None if width == dim else _shared_gaussian(dim, width, seed, "cpu")
        lead = () if num_experts is None else (num_experts,)
        self._product_DS = torch.zeros(*lead, dim, width)
        # Scalars are float64: in float32 a count stops at 2^24, 17 million tokens.
        self._trace = torch.zeros(lead, dtype=torch.float64)
        self._count = torch.zeros(lead, dtype=torch.float64)

    @property
    def count(self) -> Tensor:
        """sum_t w_t over the tokens seen: (...), float64, exact for unweighted tokens."""
        return self._count

    @property
    def trace(self) -> Tensor:
        """tr C = sum_t w_t ||x_t||^2 / count: (...), 0 where nothing was seen."""
        return (self._trace / self._safe_count()).float()

    @torch.no_grad()
    def update(
        self, input_TD: Tensor, *, mask_T: Tensor | None = None, weight_TE: Tensor | None = None
    ) -> None:
        """Add a batch of tokens (..., D), each with the weight it has for each expert, else with 1.

        `mask_T` (...): True counts. `weight_TE`: (..., E), or (...) if there are no experts. Tokens
        that hold NaN or infinity (or whose squared norm overflows float32) are left out and not
        counted. Nothing is added while activation checkpointing recomputes a forward. No transfer
        to the host takes place.
        """
        if recomputing():  # those tokens have been counted
            return
        self._check(input_TD, mask_T, weight_TE)
        self.to(input_TD.device)
        with torch.autocast(input_TD.device.type, enabled=False):
            input_TD = input_TD.reshape(-1, self.dim).float()
            weight_TE = self._weights(input_TD, weight_TE)
            square_T = input_TD.square().sum(-1)
            keep_T = square_T.isfinite() & weight_TE.isfinite().all(-1)
            if mask_T is not None:
                keep_T = keep_T & mask_T.reshape(-1).to(keep_T.device)
            # where, not a product: 0 * NaN is NaN.
            input_TD = torch.where(keep_T[:, None], input_TD, 0.0)
            weight_TE = torch.where(keep_T[:, None], weight_TE, 0.0)
            square_T = torch.where(keep_T, square_T, 0.0)
            self._add(input_TD, weight_TE, square_T)

    def _add(self, input_TD: Tensor, weight_TE: Tensor, square_T: Tensor) -> None:
        image_TS = input_TD if self._omega_DS is None else input_TD @ self._omega_DS
        num_tokens, width = image_TS.shape
        num_experts = weight_TE.shape[1]
        product_EDS = self._product_DS.view(num_experts, self.dim, width)
        # One GEMM for as many experts as fit into 64 MiB of weighted copies. ours
        group = max(1, 2**24 // max(1, num_tokens * width))
        for start in range(0, num_experts, group):
            weight_TG = weight_TE[:, start : start + group]
            weighted = (weight_TG[:, :, None] * image_TS[:, None, :]).flatten(1)
            sums = (input_TD.mT @ weighted).view(self.dim, weight_TG.shape[1], width)
            product_EDS[start : start + group] += sums.permute(1, 0, 2)
        self._trace += (square_T.double() @ weight_TE.double()).view(self._trace.shape)
        self._count += weight_TE.double().sum(0).view(self._count.shape)

    def merge(self, other: CovarianceTracker) -> None:
        """Add what `other` has seen. ValueError unless both were made with the same settings."""
        if self._settings() != other._settings():
            raise ValueError(
                f"only like trackers merge: {self._settings()} and {other._settings()} differ."
            )
        self._product_DS += other._product_DS.to(self.device)
        self._trace += other._trace.to(self.device)
        self._count += other._count.to(self.device)

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by its sum over ranks; a rank that saw nothing holds zeros on the CPU.

        `all_reduce_sum` gets float32 and float64 tensors and moves them as its backend requires.
        """
        self._product_DS = all_reduce_sum(self._product_DS)
        self._trace = all_reduce_sum(self._trace)
        self._count = all_reduce_sum(self._count)

    def covariance(self) -> Tensor:
        """C (..., D, D), symmetric, 0 where nothing was seen. ValueError for a sketch."""
        if self._omega_DS is not None:
            raise ValueError(
                f"a sketch of rank {self.rank} holds no full covariance; use spectrum(), or track "
                "with rank=None."
            )
        mean_DD = self._product_DS / self._safe_count().float()[..., None, None]
        return (mean_DD + mean_DD.mT) / 2

    def spectrum(self, rank: int | None = None) -> Spectrum:
        """The `rank` leading eigenpairs of C, by default as many as the tracker was made for."""
        rank = self.rank if rank is None else rank
        if self._omega_DS is None:
            found = spectrum(self.covariance(), rank)
            return Spectrum(found.basis_DK, found.eigenvalue_K, self.trace)
        basis_DS, value_S = nystrom(self._product_DS, self._omega_DS)
        value_S = value_S / self._safe_count().unsqueeze(-1)
        # Cut before the copy, or the whole sketch would live as long as the basis.
        return Spectrum(basis_DS[..., :rank].float(), value_S[..., :rank].float(), self.trace)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors on the CPU."""
        probe_S = torch.empty(0) if self._omega_DS is None else self._omega_DS[0]
        state = {
            "product": self._product_DS,
            "trace": self._trace,
            "count": self._count,
            "probe": probe_S,
        }
        state["settings"] = torch.tensor(
            [0 if value is None else value for value in self._settings()]
        )
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> CovarianceTracker:
        """The tracker of that state. ValueError if this torch draws another Omega from its seed."""
        dim, rank, num_experts, seed = state["settings"].tolist()
        tracker = cls(dim, rank=rank or None, num_experts=num_experts or None, seed=seed)
        if tracker._omega_DS is not None and not torch.equal(tracker._omega_DS[0], state["probe"]):
            raise ValueError(
                "the stored sketch used another random matrix than this version of torch draws "
                f"from seed {seed}; continue with the version that wrote it, or measure again."
            )
        tracker._product_DS = state["product"].clone()
        tracker._trace = state["trace"].clone()
        tracker._count = state["count"].clone()
        return tracker

    def _settings(self) -> tuple[int, int | None, int | None, int]:
        return self.dim, self.rank, self.num_experts, self.seed

    def _safe_count(self) -> Tensor:
        return torch.where(self._count > 0, self._count, 1.0)

    @property
    def device(self) -> torch.device:
        return self._product_DS.device

    # A tensor born in inference mode could not be added to outside it.
    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> CovarianceTracker:
        """This tracker, its sums moved to `device`."""
        self._product_DS = self._product_DS.to(device)
        self._trace, self._count = self._trace.to(device), self._count.to(device)
        if self._omega_DS is not None:
            self._omega_DS = _shared_gaussian(*self._omega_DS.shape, self.seed, str(device))
        return self

    def _weights(self, input_TD: Tensor, weight_TE: Tensor | None) -> Tensor:
        if weight_TE is None:
            return input_TD.new_ones(input_TD.shape[0], 1)
        return weight_TE.reshape(input_TD.shape[0], self.num_experts or 1).float()

    def _check(self, input_TD: Tensor, mask_T: Tensor | None, weight_TE: Tensor | None) -> None:
        tokens = input_TD.shape[:-1]
        if input_TD.shape[-1] != self.dim:
            raise ValueError(
                f"this tracker takes inputs of width {self.dim}, found {tuple(input_TD.shape)}."
            )
        if mask_T is not None and (mask_T.dtype != torch.bool or mask_T.numel() != tokens.numel()):
            raise ValueError(
                f"mask_T must be bool with one entry for each of {tokens.numel()} tokens, found "
                f"{mask_T.dtype} of shape {tuple(mask_T.shape)}."
            )
        if self.num_experts is not None and weight_TE is None:
            raise ValueError(
                f"a tracker of {self.num_experts} experts needs weight_TE: what share each takes."
            )
        if weight_TE is not None and weight_TE.numel() != tokens.numel() * (self.num_experts or 1):
            raise ValueError(
                f"weight_TE must hold {tokens.numel()} tokens x {self.num_experts or 1} experts, "
                f"found shape {tuple(weight_TE.shape)}."
            )


# One Omega for all layers of a width, as long as a tracker uses it: it is as large as a sketch.
_OMEGAS: WeakValueDictionary[tuple[int, int, int, str], Tensor] = WeakValueDictionary()


def _shared_gaussian(dim: int, width: int, seed: int, device: str) -> Tensor:
    key = (dim, width, seed, device)
    omega_DS = _OMEGAS.get(key)
    if omega_DS is None:
        omega_DS = gaussian(dim, width, seed).to(device)
        _OMEGAS[key] = omega_DS
    return omega_DS


def gaussian(dim: int, width: int, seed: int) -> Tensor:
    """Omega (D, S), Gaussian of variance 1/D, drawn on the CPU from its arguments."""
    # Mixed so that neighbouring seeds or widths do not share a stream; the constants are primes.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + dim) * 8_191 + width)
    return torch.randn(dim, width, generator=generator) / dim**0.5


def nystrom(product_DS: Tensor, omega_DS: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenpairs of C ~ Y (Omega^T Y)^+ Y^T, Y = C Omega: (..., D, S) and (..., S), float64.

    Y is shifted by nu Omega and the shift removed from the eigenvalues, so that rounding in an
    almost singular Omega^T Y is not amplified (arXiv:1706.05736, alg. 3; eigh in the place of
    Cholesky, which can fail).
    """
    # Wide sketches are large in float64: what can be overwritten is.
    product_DS, omega_DS = product_DS.to(torch.float64, copy=True), omega_DS.double()
    norm = torch.linalg.matrix_norm(product_DS)[..., None, None]
    # The sums behind Y were rounded to float32. 0.1: measured on inputs with one massive direction
    # (10^6 times the next): at 1 the shift hides 17 % of the other energy, at 0.1 5 %, at 0.01
    # rounding shows up as eigenvalues.
    shift = 0.1 * torch.finfo(torch.float32).eps * norm
    product_DS.addcmul_(omega_DS, shift)
    value_S, vector_SS = symmetric_eigen(omega_DS.mT @ product_DS)
    value_S = value_S.unsqueeze(-2)
    keep = value_S > 1e-3 * shift
    inverse_root = torch.where(
        keep, value_S.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0
    )
    del omega_DS
    product_DS = (product_DS @ vector_SS).mul_(inverse_root)
    basis_DS, singular_S, _ = torch.linalg.svd(product_DS, full_matrices=False)
    return basis_DS, (singular_S.square() - shift.squeeze(-1)).clamp_min(0)
