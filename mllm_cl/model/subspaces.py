"""A head of class means in several subspaces, one for each task's own adapter.

B batch, C classes, D width of a subspace, T tasks and their subspaces.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.heads import Head, class_sums, cosines


class Subspaces(Head):
    """logits of class c of task i: Σ_j w_ij cos(φ_j, P[c, j]), w_ii = 1 and `other` elsewhere.

    φ = [φ_1; …; φ_T] (B, T D). P[c, j] is the mean of the class's features in subspace j where its
    images were seen there, j ≤ i; in a newer subspace it is made of the classes that were:

        P[c, j] = Σ_c' softmax_c'(cos(P[c, i], P[c', i])) P[c', j], c' of the tasks from j on.

    Sums and counts are float64 and neither parameters nor buffers, as those of `Prototype`. Each
    task has a sum (C, j, D), j being its number.
    """

    def __init__(self, width: int, *, other: float) -> None:
        super().__init__(width)
        self.other = other
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def restore(self, known: Mapping[str, Tensor]) -> None:
        """Go on from what `learn` returned."""
        for task in range(1, sum(name.startswith("sum/") for name in known) + 1):
            self._append(known[f"sum/{task}"], known[f"count/{task}"])

    def learn(self, number: int, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Grow by the `number` classes of a task, count this process's share of their samples
        (`features` in all subspaces, and `labels`), and return what has to be remembered of all
        tasks. Collective.
        """
        sum_CD = torch.zeros(number, self.width, dtype=torch.float64)
        count_C, first = sum_CD.new_zeros(number), self.number
        for batch in batches:
            own_CD, own_C = class_sums(batch["features"], batch["labels"] - first, number)
            sum_CD, count_C = sum_CD + own_CD, count_C + own_C
        sum_CD, count_C = engine.sum_over_ranks(sum_CD), engine.sum_over_ranks(count_C)
        self._append(sum_CD.unflatten(1, (len(self.sums) + 1, -1)), count_C)
        tasks = range(len(self.sums))
        return {f"sum/{task + 1}": self.sums[task] for task in tasks} | {
            f"count/{task + 1}": self.counts[task] for task in tasks
        }

    def logits(self, features_BD: Tensor) -> Tensor:
        """The weighted sum of the cosines in all subspaces."""
        pairs = zip(self.sums, self.counts, strict=True)
        means = [sum_CTD / count_C[:, None, None] for sum_CTD, count_C in pairs]
        weight_CTD = complemented(means).to(features_BD)
        unit_BTD = functional.normalize(features_BD.unflatten(1, (len(means), -1)), dim=-1)
        share_TT = torch.full((len(means), len(means)), self.other).fill_diagonal_(1)
        share_CT = share_TT.repeat_interleave(torch.tensor([len(one) for one in means]), dim=0)
        unit_CTD = functional.normalize(weight_CTD, dim=-1) * share_CT.to(features_BD)[..., None]
        return functional.linear(unit_BTD.flatten(1), unit_CTD.flatten(1))

    def _append(self, sum_CTD: Tensor, count_C: Tensor) -> None:
        self.grow(len(count_C))
        self.sums.append(sum_CTD)
        self.counts.append(count_C)


def complemented(means: Sequence[Tensor]) -> Tensor:
    """Every class in every subspace (C, T, D), from each task's means (C, j, D) up to its own.

    Source: EASE (arXiv:2403.12030), section 4.2; as released, all classes that are known in a
    subspace take part, and similarities are not divided by a temperature.
    """
    starts = [sum(len(one) for one in means[:task]) for task in range(len(means) + 1)]
    found_CTD = means[0].new_zeros(starts[-1], len(means), means[0].shape[-1])
    for task, mean_CTD in enumerate(means):
        found_CTD[starts[task] : starts[task + 1], : task + 1] = mean_CTD
    for old in range(len(means)):
        own = slice(starts[old], starts[old + 1])
        for newer in range(old + 1, len(means)):
            known_CTD = found_CTD[starts[newer] :]
            share_CC = cosines(found_CTD[own, old], known_CTD[:, old]).softmax(dim=1)
            found_CTD[own, newer] = share_CC @ known_CTD[:, newer]
    return found_CTD
