"""Any Hugging Face Trainer made continual: the method's verbs around training, and checkpoints that
are complete.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from mllm_cl import checkpoint, engine
from mllm_cl.memory import Memory
from mllm_cl.method import Method
from mllm_cl.model.surgery import advance, guards
from mllm_cl.task import Sample, Task


@cache
def continual(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` that trains one task with a `Method`.

    It takes three more keyword arguments, `method`, `task` and `memory`. Creating it puts the
    method's adapters and guards into the model; `train()` measures, trains, and leaves in `memory`
    what the next task needs. Everything else is the Trainer's own: its arguments, callbacks and
    engines.

        trainer = continual(Trainer)(model=model, args=args, train_dataset=task.train,
                                     data_collator=collator, method=method, task=task,
                                     memory=memory)

    `train_dataset` is what the method wants to train on: `method.train_set(task, memory, past)`,
    which is the task's own data but for methods with `rehearsal`.
    Raises ValueError for a launch that would silently train something else, and for an engine on
    which the method cannot keep its promise.
    """

    class Continual(trainer_class):
        """The Trainer, with a method's verbs around it and checkpoints that are whole or absent."""

        def __init__(
            self,
            *args,
            method: Method,
            task: Task,
            memory: Memory | None = None,
            **kwargs,
        ) -> None:
            self.method, self.task = method, task
            self.memory = Memory() if memory is None else memory
            model = kwargs["model"] if "model" in kwargs else args[0]
            method.before_task(model, task, self.memory)
            super().__init__(*args, **kwargs)
            engine.check_launch(self.accelerator)
            self.engine = engine.name(self.accelerator)
            _check_engine(method, self.engine)
            if self.engine == "zero3":
                # Its backward hooks hang on a forward whose first trained weight lies behind frozen
                # ones.
                self.model.enable_input_require_grads()
            if self.engine == "fsdp2":
                engine.wrap_what_exists(self.accelerator, self.model)

        def bare_model(self) -> nn.Module:
            """The model inside the engine's wrappers: hooks and guards live on it."""
            return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

        def trained(self) -> dict[str, nn.Parameter]:
            """The parameters that train, by name."""
            return {name: p for name, p in self.bare_model().named_parameters() if p.requires_grad}

        def train(self, *args, **kwargs):
            """Train the task; afterwards the method has measured it and guards start again from
            zero.
            """
            output = super().train(*args, **kwargs)
            self.finish_task()
            return output

        def finish_task(self) -> None:
            """Let the method measure the trained model, and join each guard's step to its
            displacement.
            """
            self.measure_task()
            for one in guards(self.bare_model()).values():
                advance(one)

        def measure_task(self) -> None:
            """Let the method put what it has to remember of this data into the memory."""
            model = self.bare_model()
            self.method.after_task(
                model, self.task, self.memory, self.batches(), engine.sum_over_ranks
            )

        def batches(self) -> "Calibration":
            """This rank's share of a fixed seeded selection of the training data, collated."""
            return Calibration(
                self.train_dataset,
                self.data_collator,
                num_tokens=self.method.calibration_tokens,
                batch_size=self.args.per_device_train_batch_size,
                seed=self.args.seed,
            )

        def prepare_for_evaluation(self) -> None:
            """Bring the model to where it can answer, without an optimizer: for stages that train
            nothing.
            """
            if self.engine == "zero3":
                from transformers.integrations.deepspeed import deepspeed_init

                deepspeed_init(self, num_training_steps=0, inference=True)
            if self.engine in ("zero3", "fsdp2"):
                self.model_wrapped = self.accelerator.prepare(self.model)
            else:
                self.model.to(self.args.device)

        def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
            # One door for all engines: the model is wrapped and its optimizer exists, no step was
            # made.
            model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
            engine.check_launch(self.accelerator, self.bare_model())
            if resume_from_checkpoint is None:
                self.method.start_task(
                    self.bare_model(), self.task, self.memory, self.batches(), engine.sum_over_ranks
                )
            else:
                checkpoint.load(self, Path(resume_from_checkpoint))
            return model, loader

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
            """Nothing yet: the stock order differs from engine to engine; see
            `_prepare_for_training`.
            """

        def _load_rng_state(self, checkpoint_folder) -> None:
            if checkpoint_folder is not None:
                checkpoint.load_random_state(Path(checkpoint_folder))

        def _save_checkpoint(self, model, trial) -> None:
            self.store_flos()
            checkpoint.save(self, Path(self._get_output_dir(trial=trial)))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if type(self.method).loss is Method.loss:
                return super().compute_loss(
                    model,
                    inputs,
                    return_outputs=return_outputs,
                    num_items_in_batch=num_items_in_batch,
                )
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            extra = self.method.loss(self.bare_model(), inputs, outputs, self.memory)
            if (
                extra is not None
                and self.model_accepts_loss_kwargs
                and num_items_in_batch is not None
            ):
                # The Trainer divides the task's loss by the tokens of the whole step, so a term per
                # micro-batch
                # has to be divided by their number.
                extra = extra / self.current_gradient_accumulation_steps
            loss = loss if extra is None else loss + extra
            return (loss, outputs) if return_outputs else loss

    Continual.__name__ = Continual.__qualname__ = f"Continual{trainer_class.__name__}"
    return Continual


def _check_engine(method: Method, name: str) -> None:
    if name not in method.engines:
        raise ValueError(
            f"method {method.name!r} cannot run on {name}: it needs what only "
            f"{', '.join(method.engines)} "
            "offer. Choose another launch file or another method."
        )


@contextmanager
def learning(
    model: nn.Module,
    loader: DataLoader,
    *,
    task: Task,
    method: Method,
    memory: Memory,
    accelerator: Accelerator,
) -> Iterator[Callable[[dict[str, Tensor], object], Tensor | float]]:
    """A task in a training loop of one's own, on the model and loader that `accelerator.prepare`
    returned.

    On the way in the method measures the loader's samples with the incoming model, on the way out
    with the trained one, and guards start again from zero. `method.before_task` comes earlier,
    before the optimizer is made, since it decides what trains. Yields the method's term of the loss
    for a micro-batch, 0 where it has none.

        with learning(model, loader, task=task, method=method, memory=memory,
        accelerator=accelerator) as term:
            for batch in loader:
                outputs = model(**batch)
                accelerator.backward(outputs.loss + term(batch, outputs))

    Raises ValueError for an engine on which the method cannot keep its promise.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    engine.check_launch(accelerator, bare)
    _check_engine(method, engine.name(accelerator))
    # Of the loader only what it draws from: iterating it would advance its random state.
    batches = Calibration(loader.dataset, loader.collate_fn, num_tokens=method.calibration_tokens)

    def term(inputs: dict[str, Tensor], outputs: object) -> Tensor | float:
        extra = method.loss(bare, inputs, outputs, memory)
        return 0.0 if extra is None else extra

    method.start_task(bare, task, memory, batches, engine.sum_over_ranks)
    yield term
    method.after_task(bare, task, memory, batches, engine.sum_over_ranks)
    for one in guards(bare).values():
        advance(one)


class Calibration:
    """Collated batches of a seeded selection of samples: the same samples for any number of
    processes.

    Iterating twice gives the same batches. The selection holds about `num_tokens` tokens (all
    samples where there are fewer) in a multiple of 16 samples, so that 1, 2, 4, 8 or 16 processes
    share it evenly.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        collator,
        *,
        num_tokens: int = Method.calibration_tokens,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.samples, self.collator, self.batch_size = samples, collator, batch_size
        self.num_tokens, self.seed = num_tokens, seed

    @cached_property
    def chosen(self) -> list[int]:
        """The indices of the selection; nothing is read before a method asks for a batch."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        mean = self._collate(order[:16])["attention_mask"].sum().item() / min(16, len(order))
        number = min(len(order), max(16, int(self.num_tokens / mean)))
        world = engine.world_size()
        unit = math.lcm(16, world) if number >= math.lcm(16, world) else world
        # Fewer samples than processes: some see one twice, since all must make the same forwards.
        return (order * -(-unit // len(order)))[: max(number - number % unit, unit)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        mine = self.chosen[engine.rank() :: engine.world_size()]
        for start in range(0, len(mine), self.batch_size):
            yield self._collate(mine[start : start + self.batch_size])

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        return self.collator([self.samples[index] for index in indices])
