"""Where an update may go: a symmetric map on displacements, diagonal in a basis of the inputs.

A module trains `delta`, keeps W frozen and computes with W + guard(delta): what is forbidden stays
put under any optimizer, with clipping and weight decay. Under SGD a direction with gain g learns
g^2 times as fast (the gradient is shrunk on its way in, the delta on its way out); under Adam,
which undoes the first, about g times as fast.

Shape suffixes: D model width, O output width, K kept directions, E experts, J joint directions of
several guards. Leading dimensions "..." are empty or (E,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm_cl.drift.subspace import Spectrum, as_spectrum, energy_rank, symmetric_eigen


@dataclass(frozen=True, eq=False)
class DriftGuard:
    """The map d -> outside * (d - (d U) U^T) + (d U) diag(gain) U^T on the rows of an update d.

    basis_DK (..., D, K) orthonormal, gain_K (..., K) >= 0, `outside` the gain of every direction
    not in the basis. With leading E in the basis, d is (E, O, D). Experts may share one basis (D,
    K) and turn it each for itself: U_e = basis_DK turn_KK, turn_KK (E, K, K) orthogonal, gain_K
    (E, K), and then may have an `outside` (E,) each. It is linear and symmetric, so it is also its
    own backward.
    """

    basis_DK: Tensor
    gain_K: Tensor
    outside: float | Tensor = 1.0
    turn_KK: Tensor | None = None

    def __post_init__(self) -> None:
        each = self.basis_DK if self.turn_KK is None else self.turn_KK
        if each.dim() < 2 or self.gain_K.shape != each.shape[:-2] + self.basis_DK.shape[-1:]:
            raise ValueError(
                f"a basis (..., D, K) needs one gain for each of its K directions, found shapes "
                f"{tuple(self.basis_DK.shape)} and {tuple(self.gain_K.shape)}."
            )
        # Eigenvectors come column by column; a guard read back from a file would round otherwise.
        object.__setattr__(self, "basis_DK", self.basis_DK.contiguous())

    def __call__(self, delta: Tensor) -> Tensor:
        """The displacement that `delta` stands for: float32 (float64 if given that), autocast
        off."""
        if delta.shape[-1] != self.dim:
            raise ValueError(
                f"this guard is for weights of input width {self.dim}, found {tuple(delta.shape)}."
            )
        with torch.autocast(delta.device.type, enabled=False):
            result = torch.promote_types(
                torch.promote_types(delta.dtype, self.basis_DK.dtype), torch.float32
            )
            # TF32 rounds to 11 bits: projecting in it would leak 5e-4 of the delta.
            inner = torch.float64 if _float32_is_rounded(delta.device) else result
            delta, basis_DK = delta.to(inner), self.basis_DK.to(inner)
            turn_KK = None if self.turn_KK is None else self.turn_KK.to(inner)
            # A basis of all D directions leaves nothing outside; without that term what is closed
            # is 0 and not the rounding of d - d.
            outside = self.outside if basis_DK.shape[-1] < self.dim else 0.0
            if turn_KK is not None:
                return self._turned(delta, basis_DK, turn_KK, outside).to(result)
            excess_K = self.gain_K.to(inner) - outside
            excess_K = excess_K.unsqueeze(-2) if basis_DK.dim() > 2 else excess_K
            return (outside * delta + ((delta @ basis_DK) * excess_K) @ basis_DK.mT).to(result)

    def _turned(
        self, delta: Tensor, basis_DK: Tensor, turn_KK: Tensor, outside: float | Tensor
    ) -> Tensor:
        outside_E11 = torch.as_tensor(outside, dtype=delta.dtype, device=delta.device)
        outside_E11 = outside_E11.reshape(-1, 1, 1)
        excess_E1K = self.gain_K.to(delta.dtype).unsqueeze(-2) - outside_E11
        moved_OK = (((delta @ basis_DK) @ turn_KK) * excess_E1K) @ turn_KK.mT
        return outside_E11 * delta + moved_OK @ basis_DK.mT

    @property
    def dim(self) -> int:
        return self.basis_DK.shape[-2]

    @property
    def occupancy(self) -> Tensor:
        """The share of the D directions with gain 0, in [0, 1]: (...)."""
        closed = (self.gain_K == 0).sum(-1)
        if self.turn_KK is None and self.outside == 0:
            closed = closed + self.dim - self.gain_K.shape[-1]
        return closed / self.dim

    @property
    def lets_nothing_move(self) -> bool:
        """Whether every direction has gain 0."""
        return not (torch.as_tensor(self.outside).any() or self.gain_K.any())

    def leak(self, displacement: Tensor) -> Tensor:
        """||D U0||_F / ||D||_F, U0 all directions of gain 0: (...), float64; 0 if D is 0.

        If `outside` is 0, everything outside the basis belongs to U0.
        """
        displacement, basis_DK = displacement.double(), self.basis_DK.double()
        if self.turn_KK is not None:
            basis_DK = basis_DK @ self.turn_KK.double()
        inner_OK = displacement @ basis_DK
        closed_K = (self.gain_K == 0).unsqueeze(-2)
        leaked = (inner_OK * closed_K).square().sum((-2, -1))
        if self.turn_KK is None and self.outside == 0:
            leaked = leaked + (displacement - inner_OK @ basis_DK.mT).square().sum((-2, -1))
        whole = displacement.square().sum((-2, -1))
        return torch.where(
            whole > 0, leaked / whole.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        ).sqrt()

    @classmethod
    def free(cls, dim: int) -> DriftGuard:
        """The guard that changes nothing."""
        return cls(torch.zeros(dim, 0), torch.zeros(0))

    @classmethod
    def forbid(cls, c: Spectrum | Tensor, energy: float = 0.9) -> DriftGuard:
        """No movement in the leading directions that hold `energy` of tr C, all else free.

        If a truncated Spectrum does not hold that much, all it keeps are forbidden.
        (arXiv:2602.01990; the default is its release's `cumulative_energy_ratio`. GPM,
        arXiv:2103.09762, does this to the gradient.)
        """
        c = as_spectrum(c)
        return cls(*_leading(c, energy, inside=torch.zeros_like(c.eigenvalue_K), beyond=1.0))

    @classmethod
    def confine(cls, c: Spectrum | Tensor, energy: float = 0.99) -> DriftGuard:
        """Movement only in the leading directions that hold `energy` of tr C, C the task's own."""
        # 0.99: ours. What is left out can never be learnt, so it has to be little.
        c = as_spectrum(c)
        return cls(
            *_leading(c, energy, inside=torch.ones_like(c.eigenvalue_K), beyond=0.0), outside=0.0
        )

    @classmethod
    def slow(
        cls,
        c: Spectrum | Tensor,
        damping: float | Tensor = 0.1,
        *,
        budget: float | None = None,
        weight: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> DriftGuard:
        """Each direction slows down as much as old inputs would feel it: gain^2 = m / (lambda + m).

        m = damping * tr C / D, damping in units of the mean eigenvalue. Under SGD this is the
        preconditioner m (C + m I)^-1 (arXiv:2602.01990 eq. 14, times m so that directions without
        old inputs keep their learning rate); under Adam the factor is about its square root.
        Directions beyond the kept K count as lambda = 0: gain 1. Where experts share a basis, which
        may hold little of what one of them meets, they count as isotropic with the trace that is
        left over.

        With `budget` = eps, `damping` is not used: for each expert it is the largest value (the
        least slowing) at which the displacement d = slow(delta) of the weight W satisfies tr(d C
        d^T) / tr(W C W^T) <= eps, both traces over the kept directions; `weight` and `delta` are
        (..., O, D). A delta that already satisfies it is left free. A weight without output on old
        inputs (W C W^T = 0) allows a delta that they feel next to no movement.
        """
        c = as_spectrum(c)
        if budget is not None:
            damping = _damping_for(c, budget, weight, delta)
        damping = torch.as_tensor(damping, dtype=torch.float64, device=c.trace.device)
        if not (damping > 0).all():
            raise ValueError(
                f"damping must be positive, found {damping.tolist()}; to stop movement use forbid."
            )
        gain_K = _slow_gain(c, damping, c.eigenvalue_K).to(c.basis_DK.dtype)
        if c.turn_KK is None:
            return cls(c.basis_DK, gain_K)
        outside_E = _slow_gain(c, damping, _left_over(c).unsqueeze(-1)).squeeze(-1)
        return cls(c.basis_DK, gain_K, outside_E.to(gain_K.dtype), c.turn_KK)

    @classmethod
    def spectral(
        cls,
        c: Spectrum | Tensor,
        window: int = 3,
        *,
        clip: float = 0.2,
        energy: float = 0.9,
        reading: Literal["released", "ratio"] = "released",
    ) -> DriftGuard:
        """SAME's re-weighting of the directions that hold `energy` of tr C: gain^2 = a_i.

        h_i is the mean of s over i and the `window` - 1 directions before it (fewer at the start);
        a_i is clipped to [1 - clip, 1 + clip]; all other directions are free.

        released: a_i = (1 / h_i) / max_j (1 / h_j), s = sqrt(lambda). The released code; <= 1.
        ratio:    a_i = s_i / h_i, s = lambda. The paper's other reading (arXiv:2602.01990).

        The paper multiplies gradients by a_i, hence its root here (see `guarded_gradient`).
        """
        if window < 1 or not 0 <= clip < 1:
            raise ValueError(
                f"window must be at least 1 and clip in [0, 1), found {window} and {clip}."
            )
        if reading not in ("released", "ratio"):
            raise ValueError(f"reading is 'released' or 'ratio', found {reading!r}.")
        c = as_spectrum(c)
        value_K = c.eigenvalue_K.double()
        scale_K = value_K.sqrt() if reading == "released" else value_K
        local_K = _trailing_mean(scale_K, window)
        if reading == "released":
            inverse_K = 1 / (local_K + 1e-6)  # 1e-6: the released code
            kept_K = _kept(c, energy)
            factor_K = inverse_K / torch.where(kept_K, inverse_K, 0.0).amax(-1, keepdim=True)
        else:
            factor_K = torch.where(local_K > 0, scale_K / local_K, 1.0)
        gain_K = factor_K.nan_to_num(1.0, 1.0).clamp(1 - clip, 1 + clip).sqrt()
        return cls(*_leading(c, energy, inside=gain_K.to(c.basis_DK.dtype), beyond=1.0))

    @staticmethod
    def compose(*guards: DriftGuard) -> DriftGuard:
        """One symmetric guard for several, in one joint basis; batched and shared bases broadcast.

        Guards a, b multiply to b^1/2 a b^1/2, the exact product where they commute. What any of
        them forbids inside its basis (gain 0) stays forbidden to the last digit: it is taken out of
        the result at the end, and those guards contribute only their other gains before. Confining
        guards (outside 0) come last, outermost, so that the result does not depend on the order in
        which forbid, confine and one other guard are given.
        """
        if not guards:
            raise ValueError(
                "compose needs at least one guard; DriftGuard.free(dim) changes nothing."
            )
        if len({guard.dim for guard in guards}) > 1:
            raise ValueError(
                "guards of different input widths do not compose: "
                f"{[guard.dim for guard in guards]}."
            )
        if len(guards) == 1:
            return guards[0]
        if any(guard.turn_KK is not None for guard in guards):
            raise ValueError("guards whose experts turn a shared basis do not compose.")
        return _compose(sorted(guards, key=lambda guard: guard.outside == 0))

    def compact(self) -> DriftGuard:
        """The same map without the columns that it treats as it treats what is outside.

        The last step before a guard is used: a composition would want to know of closed columns.
        """
        if self.turn_KK is not None:
            return self  # what one expert could spare, another needs
        columns = _columns(self.basis_DK, self.gain_K, self.gain_K != self.outside)
        return DriftGuard(*columns, self.outside)

    def to(self, device: torch.device | str) -> DriftGuard:
        basis_DK, gain_K = self.basis_DK.to(device), self.gain_K.to(device)
        if self.turn_KK is None:
            return DriftGuard(basis_DK, gain_K, self.outside)
        outside = torch.as_tensor(self.outside, device=device)
        return DriftGuard(basis_DK, gain_K, outside, self.turn_KK.to(device))

    def state(self) -> dict[str, Tensor]:
        """Everything a guard is, as tensors on the CPU."""
        outside = torch.as_tensor(self.outside, dtype=torch.float64)
        state = {"basis": self.basis_DK, "gain": self.gain_K, "outside": outside}
        state |= {} if self.turn_KK is None else {"turn": self.turn_KK}
        return {name: tensor.cpu().clone() for name, tensor in state.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> DriftGuard:
        outside, turn_KK = state["outside"], state.get("turn")
        outside = float(outside) if turn_KK is None else outside.to(state["gain"].dtype)
        return cls(state["basis"], state["gain"], outside, turn_KK)


def guarded_gradient(weight: Tensor, g: DriftGuard) -> Tensor:
    """`weight` itself, with the gradient sent through the map of `g` with gain^2 and outside^2.

    This is the form of the papers (transform the gradient); under plain SGD it moves the weight
    exactly as W + g(delta) does. Under Adam or with weight decay it does not protect: prefer
    g(delta).
    """
    return _GuardedGradient.apply(weight, g)


class _GuardedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, g: DriftGuard) -> Tensor:
        ctx.guard = DriftGuard(g.basis_DK, g.gain_K.square(), g.outside**2, g.turn_KK)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.guard(gradient).to(gradient.dtype), None


def _float32_is_rounded(device: torch.device) -> bool:
    """Whether float32 matrix products on `device` run in TF32 or bfloat16."""
    # Compiled code cannot read the switch; float64 is right whatever it says.
    if torch.compiler.is_compiling():
        return device.type in ("cpu", "cuda")
    # Since torch 2.9 the older getter raises where the newer switch was used.
    if torch.__version__ >= (2, 9):
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        return backend.matmul.fp32_precision in ("tf32", "bf16")
    return torch.get_float32_matmul_precision() != "highest"


def _kept(c: Spectrum, energy: float) -> Tensor:
    """Which of the K directions are among those that hold `energy`: bool (..., K)."""
    order_K = torch.arange(c.eigenvalue_K.shape[-1], device=c.eigenvalue_K.device)
    return order_K < energy_rank(c.eigenvalue_K, c.trace, energy).unsqueeze(-1)


def _leading(c: Spectrum, energy: float, *, inside: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """Basis and gains up to the largest energy rank; experts that need fewer fill up `beyond`."""
    kept_K = _kept(c, energy)
    width = int(kept_K.sum(-1).max())
    gain_K = torch.where(kept_K, inside, beyond)
    return c.basis_DK[..., :width], gain_K[..., :width]


def _trailing_mean(value_K: Tensor, window: int) -> Tensor:
    """Mean of each entry and the `window` - 1 before it, over fewer at the start."""
    total_K = torch.nn.functional.pad(value_K.cumsum(-1), (1, 0))
    end_K = torch.arange(1, value_K.shape[-1] + 1, device=value_K.device)
    start_K = (end_K - window).clamp_min(0)
    return (total_K[..., end_K] - total_K[..., start_K]).clamp_min(0) / (end_K - start_K)


def _slow_gain(c: Spectrum, damping: Tensor, value_K: Tensor) -> Tensor:
    """sqrt(m / (lambda + m)), m = damping * tr C / D; 1 where no input was ever seen (C = 0)."""
    m = (damping * c.trace.double() / c.dim).unsqueeze(-1)
    return torch.where(
        m > 0, m / (value_K.double() + m).clamp_min(torch.finfo(torch.float64).tiny), 1.0
    ).sqrt()


def _left_over(c: Spectrum) -> Tensor:
    """The mean eigenvalue of what is not kept: (...), float64."""
    left = (c.trace.double() - c.eigenvalue_K.double().sum(-1)).clamp_min(0)
    return left / max(1, c.dim - c.eigenvalue_K.shape[-1])


def _damping_for(c: Spectrum, budget: float, weight: Tensor | None, delta: Tensor | None) -> Tensor:
    """The largest damping that meets the budget, by bisection of its logarithm."""
    if weight is None or delta is None:
        raise ValueError(
            "a budget is relative to a weight and bounds a delta: pass weight= and delta= with it."
        )
    if budget <= 0:
        raise ValueError(
            f"budget is a share of the weight's own output energy, so positive; found {budget}."
        )
    value_K = c.eigenvalue_K.double()
    moved_K = value_K * c.inner(delta.double()).square().sum(-2)
    allowed = budget * (value_K * c.inner(weight.double()).square().sum(-2)).sum(-1)
    # ours: at 1e-12 the gains of a direction with lambda above the mean are below 1e-6, at 1e12
    # above 1 - 1e-12 D.
    low, high = torch.full_like(allowed, -12.0), torch.full_like(allowed, 12.0)
    for _ in range(60):  # 24 decades / 2^60: the last digit
        middle = (low + high) / 2
        fits = (moved_K * _slow_gain(c, 10**middle, value_K).square()).sum(-1) <= allowed
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return 10**low


def _compose(guards: list[DriftGuard]) -> DriftGuard:
    dtype, outside = guards[0].basis_DK.dtype, 1.0
    basis_DJ = _joint_basis(guards)
    inner = [basis_DJ.mT @ guard.basis_DK.double() for guard in guards]
    product_JJ = torch.eye(basis_DJ.shape[-1], dtype=torch.float64, device=basis_DJ.device)
    for guard, inner_JK in zip(guards, inner, strict=True):
        root_JJ = _root(guard, inner_JK)
        product_JJ = root_JJ @ product_JJ @ root_JJ
        outside *= guard.outside
        dtype = torch.promote_types(dtype, guard.basis_DK.dtype)
    open_JJ = _open(guards, inner)
    gain_J, vector_JJ = symmetric_eigen(open_JJ @ product_JJ @ open_JJ)
    # What was projected out comes back as 1e-16; a gain that small is a zero.
    gain_J = torch.where(gain_J.abs() < 1e-9, 0.0, gain_J)
    # Directions treated like all others need no column, unless closed: `leak` watches those, and
    # whoever composes once more has to know of them.
    useful_J = ((gain_J - outside).abs() > 1e-7) | (gain_J == 0)
    basis_DJ, gain_J = _columns(basis_DJ @ vector_JJ, gain_J, useful_J)
    return DriftGuard(basis_DJ.to(dtype), gain_J.to(dtype), outside)


def _columns(basis_DK: Tensor, gain_K: Tensor, useful_K: Tensor) -> tuple[Tensor, Tensor]:
    """The useful columns and their gains, in their order; experts that have fewer fill up."""
    order_K = (~useful_K).to(torch.uint8).argsort(dim=-1, stable=True)
    order_K = order_K[..., : int(useful_K.sum(-1).max())]
    return basis_DK.take_along_dim(order_K.unsqueeze(-2), dim=-1), gain_K.gather(-1, order_K)


def _joint_basis(guards: list[DriftGuard]) -> Tensor:
    """Orthonormal columns (..., D, J) whose span holds every guard's basis; J <= D."""
    lead = torch.broadcast_shapes(*(guard.basis_DK.shape[:-2] for guard in guards))
    columns = [guard.basis_DK.double().expand(*lead, -1, -1) for guard in guards]
    return torch.linalg.qr(torch.cat(columns, dim=-1))[0]


def _root(guard: DriftGuard, inner_JK: Tensor) -> Tensor:
    """The square root of one guard in the joint basis, what it forbids treated as outside."""
    gain_K = guard.gain_K.double()
    excess_K = torch.where(gain_K == 0, guard.outside, gain_K).sqrt() - guard.outside**0.5
    identity_JJ = torch.eye(inner_JK.shape[-2], dtype=inner_JK.dtype, device=inner_JK.device)
    return guard.outside**0.5 * identity_JJ + (inner_JK * excess_K.unsqueeze(-2)) @ inner_JK.mT


def _open(guards: list[DriftGuard], inner: list[Tensor]) -> Tensor:
    """The projector onto what no guard forbids, in the joint basis."""
    total_JJ = 0.0
    for guard, inner_JK in zip(guards, inner, strict=True):
        closed_JK = inner_JK * (guard.gain_K == 0).unsqueeze(-2)
        total_JJ = total_JJ + closed_JK @ closed_JK.mT
    value_J, vector_JJ = symmetric_eigen(total_JJ)
    # 1e-12 is an angle of 1e-6: above the rounding of float32 bases, below the 1e-5 we promise.
    return (vector_JJ * (value_J < 1e-12).unsqueeze(-2)) @ vector_JJ.mT
