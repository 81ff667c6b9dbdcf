"""How far routers and experts have drifted: pure functions of logits, weights and second moments.

Router measures average over tokens (arXiv:2602.01990 reports overlap and entropy); expert measures
are what old inputs feel. Shape suffixes: T tokens, E experts, D input width, O output width, R LoRA
rank, K directions of a basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_cl.drift.subspace import Spectrum, energy_rank, trajectory

__all__ = [
    "FactorDrift",
    "displacement_leak",
    "distribution_overlap",
    "factor_drift",
    "functional_expert_drift",
    "logit_change",
    "off_task_share",
    "rerouting_accuracy",
    "routing_entropy",
    "routing_kl",
    "routing_overlap",
    "staleness",
    "subspace_occupancy",
    "trajectory",
]


def routing_overlap(
    before_TE: Tensor, after_TE: Tensor, k: int, *, mask_T: Tensor | None = None
) -> Tensor:
    """mean_t |S_before(t) and S_after(t)| / k, S the k experts with the highest score, in [0, 1].

    Any score that orders the experts as the router does: logits, or probabilities with their
    correction bias.
    """
    if not 1 <= k <= before_TE.shape[-1]:
        raise ValueError(f"k lies between 1 and the {before_TE.shape[-1]} experts, found {k}.")
    chosen_TE = _chosen(before_TE, k) & _chosen(after_TE, k)
    return _token_mean(chosen_TE.sum(-1).to(_wide(before_TE)) / k, mask_T)


def rerouting_accuracy(
    before_TE: Tensor, after_TE: Tensor, k: int, *, mask_T: Tensor | None = None
) -> Tensor:
    """mean_t [S_before(t) = S_after(t)]: the share of tokens that go to exactly the same k experts.

    It scores the new router on old tokens with the old expert sets as labels. SAME
    (arXiv:2602.01990) re-routes by training the router of the finished model once more on an old
    task and scoring that task; this needs no training.
    """
    same_T = (_chosen(before_TE, k) == _chosen(after_TE, k)).all(-1)
    return _token_mean(same_T.to(_wide(before_TE)), mask_T)


def distribution_overlap(
    before_TE: Tensor, after_TE: Tensor, *, mask_T: Tensor | None = None
) -> Tensor:
    """mean_t sum_e min(p_te, q_te) of two routing distributions: 1 if equal, 0 if disjoint."""
    dtype = _wide(before_TE)
    return _token_mean(torch.minimum(before_TE.to(dtype), after_TE.to(dtype)).sum(-1), mask_T)


def routing_entropy(probability_TE: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """mean_t -sum_e p_te log p_te / log E, in [0, 1].

    For the entropy of the load pass the mean over tokens, (1, E).
    """
    probability_TE = probability_TE.to(_wide(probability_TE))
    entropy_T = torch.special.entr(probability_TE).sum(-1)
    num_experts = max(2, probability_TE.shape[-1])  # of one expert the entropy is 0, not 0 / 0
    return _token_mean(entropy_T / math.log(num_experts), mask_T)


def routing_kl(before_TE: Tensor, after_TE: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """mean_t KL(p_before || p_after) in nats, from the two routers' logits."""
    dtype = _wide(before_TE)
    before_TE, after_TE = before_TE.to(dtype).log_softmax(-1), after_TE.to(dtype).log_softmax(-1)
    divergence_TE = torch.where(before_TE.isneginf(), 0.0, before_TE.exp() * (before_TE - after_TE))
    return _token_mean(divergence_TE.sum(-1), mask_T)


def logit_change(before_TE: Tensor, after_TE: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """||after - before||_F / ||before||_F over the tokens that count; 0 if nothing changed."""
    dtype = _wide(before_TE)
    before_TE, after_TE = before_TE.to(dtype), after_TE.to(dtype)
    change_T = (after_TE - before_TE).square().sum(-1)
    size_T = before_TE.square().sum(-1)
    return _ratio(_token_mean(change_T, mask_T), _token_mean(size_T, mask_T)).sqrt()


def displacement_leak(displacement: Tensor, basis_DK: Tensor) -> Tensor:
    """||D U||_F / ||D||_F, the share of a displacement (..., O, D) inside a subspace."""
    displacement, basis_DK = displacement.double(), basis_DK.double()
    inside = (displacement @ basis_DK).square().sum((-2, -1))
    return _ratio(inside, displacement.square().sum((-2, -1))).sqrt()


def off_task_share(displacement: Tensor, basis_DK: Tensor) -> Tensor:
    """||D (I - U U^T)||_F / ||D||_F: the share of a displacement outside the task's subspace U."""
    displacement, basis_DK = displacement.double(), basis_DK.double()
    outside = displacement - (displacement @ basis_DK) @ basis_DK.mT
    return _ratio(outside.square().sum((-2, -1)), displacement.square().sum((-2, -1))).sqrt()


def functional_expert_drift(displacement: Tensor, weight: Tensor, covariance_DD: Tensor) -> Tensor:
    """tr(dW C dW^T) / tr(W C W^T) = E||dW x||^2 / E||W x||^2 over old inputs x: (...).

    The numerator is the degradation that SAME bounds (arXiv:2602.01990).
    """
    return _ratio(
        _felt(displacement, displacement, covariance_DD), _felt(weight, weight, covariance_DD)
    )


@dataclass(frozen=True, eq=False)
class FactorDrift:
    """functional_expert_drift of a low-rank expert, total = from_b + from_a + cross."""

    total: Tensor
    from_b: Tensor
    from_a: Tensor
    cross: Tensor


def factor_drift(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    weight: Tensor,
    covariance_DD: Tensor,
) -> FactorDrift:
    """How much of an expert's drift comes through each factor, A (..., R, D) and B (..., O, R).

    `before` and `after` are (A, B) and (A', B'). With dA = A' - A and dB = B' - B, exactly
    dW = B' A' - B A = X + Y,  X = dB (A + A') / 2,  Y = (B + B') / 2 dA, and with S = tr(W C W^T)
    from_b = tr(X C X^T) / S, from_a = tr(Y C Y^T) / S, cross = 2 tr(X C Y^T) / S (any sign).
    `weight` (..., O, D) is what the drift is relative to: the expert's own B A, or base + adapter.
    """
    (a_RD, b_OR), (new_a_RD, new_b_OR) = before, after
    through_b = (new_b_OR - b_OR) @ (a_RD + new_a_RD) / 2
    through_a = (b_OR + new_b_OR) @ (new_a_RD - a_RD) / 2
    size = _felt(weight, weight, covariance_DD)
    from_b = _ratio(_felt(through_b, through_b, covariance_DD), size)
    from_a = _ratio(_felt(through_a, through_a, covariance_DD), size)
    cross = _ratio(2 * _felt(through_b, through_a, covariance_DD), size)
    return FactorDrift(from_b + from_a + cross, from_b, from_a, cross)


def subspace_occupancy(c: Spectrum, energy: float) -> Tensor:
    """The share of all D directions that hold `energy`: (...), what forbidding them costs."""
    return energy_rank(c.eigenvalue_K, c.trace, energy) / c.dim


def staleness(tracked_DD: Tensor, final_DD: Tensor) -> Tensor:
    """||C_tracked - C_final||_F / ||C_final||_F: how far tracking lags the finished model."""
    tracked_DD, final_DD = tracked_DD.double(), final_DD.double()
    difference = (tracked_DD - final_DD).square().sum((-2, -1))
    return _ratio(difference, final_DD.square().sum((-2, -1))).sqrt()


def _chosen(score_TE: Tensor, k: int) -> Tensor:
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    return chosen_TE.scatter_(-1, score_TE.topk(k, dim=-1).indices, True)


def _felt(left: Tensor, right: Tensor, covariance_DD: Tensor) -> Tensor:
    """tr(L C R^T)."""
    dtype = _wide(left)
    return ((left.to(dtype) @ covariance_DD.to(dtype)) * right.to(dtype)).sum((-2, -1))


def _token_mean(value_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the tokens that count, 0 if none does."""
    if mask_T is None:
        return value_T.sum() / max(1, value_T.numel())
    # where, not a product: padding may hold NaN.
    kept_T = torch.where(mask_T, value_T, 0.0)
    return kept_T.sum() / mask_T.sum().clamp_min(1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 / 0 is 0 and anything else over 0 infinite."""
    return torch.where((part == 0) & (whole == 0), 0.0, part / whole)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
