"""What enters each of a model's own experts, and how a task's data uses them.

N rows (a token at one of its experts), D width of what enters, E experts, K kept directions.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mllm_cl.drift.activation import ExpertUsage
from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.expert_moments import ExpertMoments
from mllm_cl.model.expert_lora import Rows, adapted
from mllm_cl.model.experts import Experts
from mllm_cl.model.watch import Watch, evaluating, forward, kept_rank, measure

Reduce = Callable[[Tensor], Tensor]


class LayerWatch:
    """The first look: the directions of what enters all down products of a layer together, by
    source (`PATH.STACK`), and `use` of the experts by the module that holds them.

    What enters the up products is what enters the module, which a `Watch` measures.
    """

    def __init__(self, model: nn.Module, *, rank: int) -> None:
        layouts = {path: lora.layout for path, lora in adapted(model).items()}
        self.use = {path: ExpertUsage(one.num_experts) for path, one in layouts.items()}
        self._down = {
            f"{path}.{one.down}": CovarianceTracker(one.inner, rank=kept_rank(one.inner, rank))
            for path, one in layouts.items()
        }
        self._up = {f"{path}.{one.up}": path for path, one in layouts.items()}

    def gather(self, source: str, input_ND: Tensor, rows: Rows, mask_N: Tensor | None) -> None:
        """Count the rows of one product."""
        if source in self._down:
            # Directions alone: an expert with small inputs has as much say as one with large ones.
            directions = torch.nn.functional.normalize(input_ND.float(), dim=-1)
            self._down[source].update(directions, mask_T=mask_N)
            return
        use = self.use[self._up[source]]
        used_NE = input_ND.new_zeros(len(input_ND), len(use.utilisation_E))
        used_NE[torch.arange(len(input_ND), device=input_ND.device), rows.expert_N] = 1.0
        weight_NE = used_NE if rows.weight_N is None else used_NE * rows.weight_N[:, None]
        use.update(weight_NE, input_ND, mask_T=mask_N, used_TE=used_NE)

    def reduce(self, all_reduce_sum: Reduce) -> None:
        """Sum over ranks. Collective."""
        for sums in (self._down, self.use):
            for path in sorted(sums):
                sums[path].reduce(all_reduce_sum)

    def bases(self, watch: Watch, rank: int) -> dict[str, Tensor]:
        """The `rank` leading directions of what enters each stack, from a reduced `watch`."""
        entering = {
            source: watch.trackers[watch.source_of[path]] for source, path in self._up.items()
        }
        spectra = {source: one.spectrum(rank) for source, one in (entering | self._down).items()}
        return {source: c.basis_DK[:, :rank] for source, c in spectra.items()}


def expert_moments(
    model: nn.Module,
    bases: dict[str, Tensor],
    batches: Iterable[dict[str, Tensor]],
    reduce: Reduce,
) -> dict[str, ExpertMoments]:
    """The second look: the moment of what enters each expert, in the basis of its stack."""
    num_experts = {path: lora.layout.num_experts for path, lora in adapted(model).items()}
    found = {
        source: ExpertMoments(basis_DK, num_experts[source.rpartition(".")[0]])
        for source, basis_DK in bases.items()
    }

    def gather(source: str, input_ND: Tensor, rows: Rows, mask_N: Tensor | None) -> None:
        found[source].update(input_ND, rows.expert_N, mask_N=mask_N)

    measure(model, {}, {}, batches, rank=1, gather=gather)
    for source in sorted(found):
        found[source].reduce(reduce)
    return found


def chosen_experts(
    model: nn.Module,
    found: Mapping[str, Experts],
    batches: Iterable[dict[str, Tensor]],
    reduce: Reduce,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each experts module, over the tokens of the batches: the share of choices that fell on
    each expert, and its mean weight, 0 where it was not chosen; (E,) each, float64. Collective.
    """
    device = next(model.parameters()).device
    sums = {
        path: torch.zeros(2, one.num_experts, dtype=torch.float64, device=device)
        for path, one in found.items()
    }

    def gather(path: str, args: tuple, mask_T: Tensor | None) -> None:
        _, index_TK, weight_TK = args
        weight_TK = weight_TK.double()
        if mask_T is not None:
            keep_T = mask_T.reshape(-1)
            index_TK, weight_TK = index_TK[keep_T], weight_TK[keep_T]
        index_N, ones_N = index_TK.flatten(), torch.ones_like(weight_TK).flatten()
        sums[path][0].index_add_(0, index_N, ones_N)
        sums[path][1].index_add_(0, index_N, weight_TK.flatten())

    with Watch(model, {}) as watch, evaluating(model):
        for path, one in found.items():
            watch.follow(path, one.module, gather)
        for batch in batches:
            forward(model, batch)
    total = {path: reduce(sums[path]) for path in sorted(sums)}
    return {
        path: (both[0] / both[0].sum(), both[1] * found[path].top_k / both[0].sum())
        for path, both in total.items()
    }
