"""Which experts a task trains: those busy on the present and unimportant to the past.

From SAME (arXiv:2602.01990). Its paper re-decides at every batch from averages that the current
task overwrites, and its released code collapses to one active expert. Here the past is a snapshot,
the decision is made once after a warm-up, and some experts always stay. Shape suffixes: T tokens, D
model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mllm_cl.drift.covariance import recomputing


class ExpertUsage:
    """The sums behind each expert's utilisation, mean w_te, and importance, mean w_te ||x_t||^2."""

    def __init__(self, num_experts: int) -> None:
        self._weight_E = torch.zeros(num_experts, dtype=torch.float64)
        self._energy_E = torch.zeros(num_experts, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        weight_TE: Tensor,
        input_TD: Tensor,
        *,
        mask_T: Tensor | None = None,
        used_TE: Tensor | None = None,
    ) -> None:
        """Add a batch of routing weights (..., E) and the inputs (..., D) they are for.

        The weights are those before any expert is masked. `used_TE` is what utilisation averages
        in their place, as where top-k decides who is used. Tokens outside the mask, and those that
        are not finite, do not count. Nothing is added during a recompute.
        """
        if recomputing():
            return
        num_experts = len(self._weight_E)
        if weight_TE.shape != (*input_TD.shape[:-1], num_experts):
            raise ValueError(
                f"expected weights (..., {num_experts}) for the same tokens as the inputs, found "
                f"{tuple(weight_TE.shape)} and {tuple(input_TD.shape)}."
            )
        self._move(weight_TE.device)
        weight_TE = weight_TE.reshape(-1, weight_TE.shape[-1]).double()
        square_T = input_TD.reshape(-1, input_TD.shape[-1]).float().square().sum(-1).double()
        keep_T = square_T.isfinite() & weight_TE.isfinite().all(-1)
        if mask_T is not None:
            keep_T = keep_T & mask_T.reshape(-1).to(keep_T.device)
        weight_TE = torch.where(keep_T[:, None], weight_TE, 0.0)
        used_TE = weight_TE if used_TE is None else used_TE.to(weight_TE) * keep_T[:, None]
        self._weight_E += used_TE.sum(0)
        self._energy_E += torch.where(keep_T, square_T, 0.0) @ weight_TE
        self._count += keep_T.sum()

    @torch.no_grad()
    def update_rows(
        self,
        expert_N: Tensor,
        input_ND: Tensor,
        weight_N: Tensor | None,
        *,
        mask_N: Tensor | None = None,
    ) -> None:
        """Add rows (N, D) that each went to one expert, utilisation being its share of them.

        The same as `update` with one-hot `used_TE`, which would be as large as the inputs. No
        weights are ones.
        """
        if recomputing():
            return
        self._move(input_ND.device)
        square_N = input_ND.float().square().sum(-1).double()
        weight_N = torch.ones_like(square_N) if weight_N is None else weight_N.double()
        keep_N = square_N.isfinite() & weight_N.isfinite()
        keep_N = keep_N if mask_N is None else keep_N & mask_N.to(keep_N.device)
        self._weight_E.index_add_(0, expert_N, keep_N.double())
        self._energy_E.index_add_(0, expert_N, torch.where(keep_N, weight_N * square_N, 0.0))
        self._count += keep_N.sum()

    @property
    def count(self) -> Tensor:
        """The number of tokens seen."""
        return self._count

    @property
    def utilisation_E(self) -> Tensor:
        """mean_t w_te; 0 before anything was seen."""
        return (self._weight_E / self._count.clamp_min(1)).float()

    @property
    def importance_E(self) -> Tensor:
        """mean_t w_te ||x_t||^2, the energy an expert has handled; 0 before anything was seen."""
        return (self._energy_E / self._count.clamp_min(1)).float()

    def merge(self, other: ExpertUsage) -> None:
        """Add what `other` has seen: how the importance of earlier tasks accumulates."""
        if len(other._weight_E) != len(self._weight_E):
            raise ValueError(
                f"{len(self._weight_E)} and {len(other._weight_E)} experts cannot be added up."
            )
        self._weight_E += other._weight_E.to(self._weight_E.device)
        self._energy_E += other._energy_E.to(self._weight_E.device)
        self._count += other._count.to(self._weight_E.device)

    def without(self, part: ExpertUsage) -> ExpertUsage:
        """What is left when some of what was seen no longer counts."""
        left = ExpertUsage(len(self._weight_E))
        left._weight_E = (self._weight_E - part._weight_E).clamp_min(0)
        left._energy_E = (self._energy_E - part._energy_E).clamp_min(0)
        left._count = (self._count - part._count).clamp_min(0)
        return left

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by its sum over ranks, so that all ranks decide alike."""
        self._weight_E = all_reduce_sum(self._weight_E)
        self._energy_E = all_reduce_sum(self._energy_E)
        self._count = all_reduce_sum(self._count)

    def state(self) -> dict[str, Tensor]:
        state = {"weight": self._weight_E, "energy": self._energy_E, "count": self._count}
        return {name: tensor.cpu().clone() for name, tensor in state.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ExpertUsage:
        usage = cls(len(state["weight"]))
        usage._weight_E, usage._energy_E = state["weight"].clone(), state["energy"].clone()
        usage._count = state["count"].clone()
        return usage

    # A tensor born in inference mode could not be added to outside it.
    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        self._weight_E, self._energy_E = self._weight_E.to(device), self._energy_E.to(device)
        self._count = self._count.to(device)


def activation_score(utilisation_E: Tensor, importance_E: Tensor) -> Tensor:
    """minmax(U) - minmax(F_pre) in [-1, 1]: high if used now and of little matter before."""
    return _minmax(utilisation_E) - _minmax(importance_E)


def active_experts(
    utilisation_E: Tensor, importance_E: Tensor | None, *, threshold: float = 0.1, keep: int = 2
) -> Tensor:
    """Which experts go on training: bool (E,); a score of `threshold`, and never fewer than `keep`.

    Decide once per task, after a warm-up, from this task's utilisation and a snapshot of the
    importance for earlier tasks. The highest scores stay (the lower index where equal). All are
    active at the first task, where no importance exists (None or all zero). 0.1 is the released
    code's; keep = 2 is ours: with one expert left its renormalised weight is the constant 1 and the
    router gets no gradient.
    """
    if keep < 1:
        raise ValueError(f"at least one expert has to train, found keep={keep}.")
    if importance_E is None or not importance_E.any():
        return torch.ones_like(utilisation_E, dtype=torch.bool)
    score_E = activation_score(utilisation_E, importance_E)
    active_E = score_E >= threshold
    active_E[score_E.argsort(descending=True, stable=True)[:keep]] = True
    return active_E


class ReleasedActivation:
    """The released code's rule step by step, to compare with: it ends with one active expert.

    At every forward U and F_pre both follow the current batch (U <- 0.95 U + 0.05 mean w, F_pre
    likewise with mean w ||x||^2, though it should describe the past), and an expert with score <
    0.1 is frozen unless it is the one numbered like the task. Once all others are frozen the
    decision is final for the task.
    """

    def __init__(self, num_experts: int, task: int = 0, importance_E: Tensor | None = None) -> None:
        self.task = task
        self.utilisation_E = torch.full((num_experts,), 1.0 / num_experts)
        self.importance_E = (
            torch.zeros(num_experts) if importance_E is None else importance_E.clone()
        )
        self.active_E = torch.ones(num_experts, dtype=torch.bool)
        self.final = False

    @torch.no_grad()
    def step(self, weight_TE: Tensor, input_TD: Tensor) -> Tensor:
        """The experts active after a forward with unmasked weights (T, E) and inputs (T, D)."""
        weight_TE, square_T = weight_TE.float(), input_TD.float().square().sum(-1)
        self.utilisation_E = 0.95 * self.utilisation_E + 0.05 * weight_TE.mean(0)
        energy_E = (weight_TE * square_T[:, None]).mean(0)
        self.importance_E = 0.95 * self.importance_E + 0.05 * energy_E
        if not self.final:
            self.active_E = activation_score(self.utilisation_E, self.importance_E) >= 0.1
            self.active_E[self.task] = True
            self.final = int(self.active_E.sum()) == 1
        return self.active_E

    def state(self) -> dict[str, Tensor]:
        return {
            "task": torch.tensor(self.task),
            "utilisation": self.utilisation_E,
            "importance": self.importance_E,
            "active": self.active_E,
            "final": torch.tensor(self.final),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ReleasedActivation:
        rule = cls(len(state["active"]), int(state["task"]), state["importance"])
        rule.utilisation_E, rule.active_E = state["utilisation"].clone(), state["active"].clone()
        rule.final = bool(state["final"])
        return rule


def _minmax(value_E: Tensor) -> Tensor:
    """(v - min) / (max - min), 0 if all are equal."""
    span = value_E.max() - value_E.min()
    return torch.where(span > 0, (value_E - value_E.min()) / span, 0.0)
