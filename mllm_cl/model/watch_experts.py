"""What enters each of a model's own experts, and how a task's data uses them.

N rows (a token at one of its experts), D width of what enters, E experts, K kept directions.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mllm_cl import engine
from mllm_cl.drift.activation import ExpertUsage
from mllm_cl.drift.covariance import CovarianceTracker
from mllm_cl.drift.expert_moments import ROWS, ExpertMoments
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
        for start in range(0, len(input_ND), ROWS):
            part = slice(start, start + ROWS)
            mask = None if mask_N is None else mask_N[part]
            if source in self._down:
                # Directions alone: one with small inputs has as much say as one with large ones.
                directions = torch.nn.functional.normalize(input_ND[part].float(), dim=-1)
                self._down[source].update(directions, mask_T=mask)
                continue
            weight_N = None if rows.weight_N is None else rows.weight_N[part]
            use = self.use[self._up[source]]
            use.update_rows(rows.expert_N[part], input_ND[part], weight_N, mask_N=mask)

    def reduce(self, all_reduce_sum: Reduce) -> None:
        """Sum over ranks. Collective."""
        for sums in (self._down, self.use):
            for path in sorted(sums):
                sums[path].reduce(all_reduce_sum)

    def move(self, source: str, device: torch.device) -> None:
        """Bring what is known of a stack to `device`: where no rows came it is on the CPU."""
        if source in self._down:
            self._down[source].to(device)

    def bases(self, watch: Watch, rank: int) -> dict[str, Tensor]:
        """The `rank` leading directions of what enters each stack, from a reduced `watch`."""
        entering = {
            source: watch.trackers[watch.source_of[path]] for source, path in self._up.items()
        }
        both = entering | self._down
        return {source: one.spectrum(rank).basis_DK for source, one in both.items()}


def expert_moments(
    model: nn.Module,
    bases: dict[str, Tensor],
    batches: Iterable[dict[str, Tensor]],
    reduce: Reduce,
) -> dict[str, ExpertMoments]:
    """The second look: the moment of what enters each expert, in the basis of its stack.

    All ranks take the bases of the first: their sums add only in the very same coordinates, and
    equal sums need not give equal eigenvectors on unlike devices. Collective.
    """
    own = engine.rank() == 0
    bases = {
        source: reduce(bases[source] if own else torch.zeros_like(bases[source]))
        for source in sorted(bases)
    }
    assert all(basis_DK.any() for basis_DK in bases.values()), "no process is the first"
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

    Raises ValueError, on all ranks alike, if no token of any rank reached some module.
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
    for path, both in total.items():
        if not both[0].sum():
            raise ValueError(
                f"no token of the task's data reached the experts at {path}, so none can be chosen "
                "by use. Give data that uses them, or choose expert_lora."
            )
    return {
        path: (both[0] / both[0].sum(), both[1] * found[path].top_k / both[0].sum())
        for path, both in total.items()
    }
