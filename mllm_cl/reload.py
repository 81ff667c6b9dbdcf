"""Whether what a stage wrote is what it learnt: the file is read again, has to hold the same bytes,
and to change the logits as the live model's own tensors did.
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

    everywhere = True


def check_reload(trainer: Trainer, file: Path, state: dict[str, Tensor]) -> None:
    """Raise NotSaved unless `file` holds `state` to the last bit and gives the live model's logits
    again, FloatingPointError where these are no numbers.

    Whatever trained and whatever is in the state is set to zero before the file is read, so that a
    tensor that is missing there, or came back as another, shows. Two processes find the same.
    Collective; the model is left as it was.
    """
    model = trainer.bare_model()
    batch = trainer.data_collator([trainer.train_dataset[0]])

    def logits() -> Tensor:
        with evaluating(model):
            return forward(model, batch).logits[:, -POSITIONS:].cpu()

    written = load_tensors(file)
    _check_bytes(file, written, state)
    live, again = logits(), logits()
    if engine.any_rank(not live.isfinite().all()):
        raise FloatingPointError(
            f"after its last step the model answers a sample of {trainer.task.name} with logits "
            "that are NaN or infinite. Lower the learning rate, or clip with max_grad_norm; the "
            "same command goes on from the last checkpoint."
        )
    for weight in trainer.trained().values():
        engine.write(weight, torch.zeros(engine.shape(weight), dtype=weight.dtype))
    zero = torch.zeros(())  # shown in every shape, so that no copy of the state is made
    restore_state(model, {name: zero.expand(value.shape) for name, value in state.items()})
    without = logits()
    restore_state(model, written)
    found = logits()
    change, error = _distance(live, without), _distance(live, found)
    rounding = max(1e-5, torch.finfo(live.dtype).eps) * float(live.float().norm())
    if engine.any_rank(not error <= NOISE * _distance(live, again) + rounding):
        raise NotSaved(
            f"{file} does not give back what was learnt: read again, it changes the logits of a "
            f"sample by {_distance(found, without):.3g}, the live model did by {change:.3g}, and "
            f"{error:.3g} lies between them. Something that trains is not in the state (a method's "
            "own parameter?)."
        )


def _check_bytes(file: Path, written: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    # The first process wrote its own; those of others may differ from it by the last bit.
    names = sorted(written.keys() | state.keys()) if engine.rank() == 0 else []
    lost = [name for name in names if not _same(written.get(name), state.get(name))]
    if engine.any_rank(bool(lost)):
        which = f"{len(lost)} of {len(names)} tensors, {lost[0]} first," if lost else "tensors"
        raise NotSaved(
            f"{file} does not give back what was learnt: {which} are not as they were written. "
            "Look after the disk; the same command goes on from the last checkpoint."
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are there, and are of the same bits."""
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = [part.detach().cpu().contiguous().flatten().view(torch.uint8) for part in (one, other)]
    return torch.equal(*bits)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm())
