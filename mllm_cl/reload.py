"""Whether what a stage wrote is what it learnt: the file is read again, and has to change the
logits as the live model's own tensors did.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer

from mllm_cl import engine
from mllm_cl.memory import load_tensors
from mllm_cl.model.surgery import restore_state
from mllm_cl.model.watch import evaluating, forward
from mllm_cl.stopping import Failed

POSITIONS = 16  # of the end of a sample, where its answer is: all of them may be gigabytes. ours
NOISE = 10.0  # times what two passes differ by, where sums have no fixed order. ours


class NotSaved(Failed):
    """What a stage has written does not give back what it learnt."""


def check_reload(trainer: Trainer, file: Path, state: dict[str, Tensor]) -> None:
    """Raise NotSaved unless `file`, which holds `state`, gives the live model's logits again.

    Whatever trained and whatever is in the state is set to zero before the file is read, so that a
    tensor that is missing there, or came back as another, shows. Two processes find the same.
    Collective; the model is left as it was.
    """
    model = trainer.bare_model()
    batch = trainer.data_collator([trainer.train_dataset[0]])

    def logits() -> Tensor:
        with evaluating(model):
            return forward(model, batch).logits[:, -POSITIONS:].cpu()

    live, again = logits(), logits()
    for weight in trainer.trained().values():
        engine.write(weight, torch.zeros(engine.shape(weight), dtype=weight.dtype))
    restore_state(model, {name: torch.zeros_like(value) for name, value in state.items()})
    without = logits()
    restore_state(model, load_tensors(file))
    found = logits()
    change, error = _distance(live, without), _distance(live, found)
    rounding = max(1e-5, torch.finfo(live.dtype).eps) * float(live.float().norm())
    if engine.any_rank(not error <= NOISE * _distance(live, again) + rounding):
        raise NotSaved(
            f"{file} does not give back what was learnt: read again, it changes the logits of a "
            f"sample by {_distance(found, without):.3g}, the live model did by {change:.3g}, and "
            f"{error:.3g} lies between them. Something that trains is not in the state (a method's "
            "own parameter?), or the disk has lost some of it."
        )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm())
