"""How far one model's answers are from another's, by the logits of a few samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_cl.model.watch import evaluating, forward
from mllm_cl.reload import POSITIONS
from mllm_cl.stopping import Failed


class Unlike(Failed):
    """What was exported does not answer as the trained model did."""

    everywhere = True


@dataclass(frozen=True)
class Difference:
    """How far an export's logits are from the trained model's, in shares of their norm; `same` is
    the share of positions with the same most likely token, `learnt` what training had moved, and
    `packing` what four bits of the base had.
    """

    relative: float
    largest: float
    same: float
    learnt: float
    packing: float
    samples: int


def logits(model: nn.Module, samples: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """What a model says at the end of each sample, where its answer is, by sample."""
    with evaluating(model):
        return [forward(model, sample).logits[0, -POSITIONS:].cpu() for sample in samples]


def compare(
    found: list[Tensor], live: list[Tensor], before: list[Tensor], packed: list[Tensor] | None
) -> Difference:
    """How `found` differs from `live`, which training had made of `before`; `packed` is what it was
    on a base in four bits, None where there was none.
    """
    old, want, have = (torch.cat(each).double() for each in (before, live, found))
    size = want.norm()
    packed = want if packed is None else torch.cat(packed).double()
    return Difference(
        relative=float((have - want).norm() / size),
        largest=float((have - want).abs().max()),
        same=float((have.argmax(-1) == want.argmax(-1)).double().mean()),
        learnt=float((want - old).norm() / size),
        packing=float((packed - want).norm() / size),
        samples=len(found),
    )


def check(difference: Difference, dtype: torch.dtype, form: str) -> None:
    """Raise Unlike where an export loses some of what was learnt, beyond rounding."""
    # Sums in another order, and here and there a token at another expert for it. ours
    noise = 1e-3 if dtype == torch.float32 else 0.05
    if not difference.relative <= max(noise, 0.1 * difference.learnt):
        raise Unlike(
            f"opened again, the {form} folder answers otherwise than the trained model: its logits "
            f"differ by {difference.relative:.2g} of their norm, and learning had moved them by "
            f"{difference.learnt:.2g}. Nothing is left of it. Where the base is bf16, rounding may "
            "swallow a small change: export peft, or train with 'dtype: float32'."
        )
