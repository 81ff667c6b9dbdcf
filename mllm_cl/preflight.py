"""The largest batch first: what does not fit into memory ends a task before step 1, not at 900."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from mllm_cl import checkpoint, engine
from mllm_cl.cost import forget_peak
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.lengths import Lengths
from mllm_cl.model.adapt import rest
from mllm_cl.stopping import Failed


class TooLarge(Failed):
    """The largest batch of a task does not fit into the memory of this process."""


def push(trainer: Trainer) -> None:
    """Push the longest samples of a task through one forward and backward pass, on the engine that
    trains; TooLarge if they do not fit. Collective.

    They are as many as a process takes at once, with the method's term of the loss and beside as
    much memory as Adam will take. Nothing stays: no weight, gradient or buffer differs afterwards,
    nor a random state of the CPU or of CUDA (those of MPS and XPU do), and the accelerator's peak
    counts anew. Nothing happens where lengths are not known cheaply (another collator than ours, a
    stream), nor with re-entrant checkpointing, which cannot leave gradients out.
    """
    arguments, collator = trainer.args, trainer.data_collator
    reentrant = (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    streamed = isinstance(trainer.train_dataset, IterableDataset)
    if reentrant or streamed or not isinstance(collator, ChatCollator):
        return
    with _unchanged(trainer):
        number = arguments.per_device_train_batch_size
        found = Lengths(collator.processor).longest(trainer.train_dataset, number)
        if not found:
            return
        samples = [trainer.train_dataset[place] for _, place in found]
        try:
            _pass(trainer, collator((samples * number)[:number]))
        except (MemoryError, RuntimeError) as error:  # torch's own is one, too
            if not _is_out_of_memory(error):
                raise
            problem = _problem(trainer, samples[0]["id"], found[0][0], str(error))
            raise TooLarge(problem) from error
    forget_peak()


def _pass(trainer: Trainer, batch: dict) -> None:
    bare = trainer.bare_model()
    bare.train()
    inputs = trainer._prepare_inputs(batch)
    trained = list(trainer.trained().values())
    room = engine.room_for_moments(trainer.optimizer, trained)
    with trainer.compute_loss_context_manager():
        trainer.method.before_forward(bare, inputs, trainer.memory)
        outputs = bare(**inputs)
        loss = outputs.loss + trainer.term(inputs, outputs)
    engine.try_backward(loss, trained)
    room.clear()


@contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """Put back whatever a training pass changes besides gradients."""
    state, model, memory = checkpoint.random_state(), trainer.bare_model(), trainer.memory
    remembered = dict(memory)
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        # Methods that decide at every step which experts learn keep that in the memory.
        for name in [name for name in memory if memory[name] is not remembered.get(name)]:
            del memory[name]
        for name in remembered.keys() - memory.keys():
            memory[name] = remembered[name]
        rest(model)
        checkpoint.set_random_state(state)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is of memory; the CPU's allocator has no class of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(error)
    return any(sign in told for sign in ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED"))


def _problem(trainer: Trainer, name: str, tokens: int, reason: str) -> str:
    arguments = trainer.args
    number, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    ways = []
    if number > 1:
        half = next(size for size in range(number // 2, 0, -1) if number % size == 0)
        ways.append(
            f"training.per_device_train_batch_size: {half} with "
            f"training.gradient_accumulation_steps: {times * number // half} (the same steps)"
        )
    if not arguments.gradient_checkpointing:
        ways.append("training.gradient_checkpointing: true")
    frozen = (weight for weight in trainer.model.parameters() if not weight.requires_grad)
    if any(weight.dtype == torch.float32 for weight in frozen):  # what trains always is
        ways.append("model.dtype: bfloat16")
    ways.append(f"data.max_length below {tokens} with data.too_long: drop")
    return (
        f"{trainer.task.name}: its longest samples do not fit into the memory of "
        f"{arguments.device}: {number} at once, the longest {name!r} with {tokens} tokens. "
        f"Set one of {'; '.join(ways)}. No step was made ({reason.splitlines()[0]})"
    )
