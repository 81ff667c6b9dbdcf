"""Any Hugging Face Trainer made continual: the method's verbs around training, and checkpoints that
are complete.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from weakref import ref

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ProcessorMixin, Trainer, TrainerCallback

from mllm_cl import checkpoint, engine, preflight
from mllm_cl.data.chat import ChatCollator, picture_inputs
from mllm_cl.memory import Memory
from mllm_cl.method import Batches, Method
from mllm_cl.model.idle import visit_idle
from mllm_cl.model.precision import check_wide, widen
from mllm_cl.model.surgery import advance, guards
from mllm_cl.model.teacher import fill_copy
from mllm_cl.model.tower import show_guard_picture
from mllm_cl.model.vision import resting
from mllm_cl.task import Sample, Task
from mllm_cl.truth import Trial, Truth


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
    `trainer.measured`, batches, takes the place of the selection of the training data that the
    method measures. `trainer.tries_largest` says whether the longest samples are tried before
    step 1 (`preflight.push`): True on an accelerator, whose memory ends sooner and where it costs
    next to nothing.
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
            self._unwrapped: tuple[ref[nn.Module], ref[nn.Module]] | None = None
            # The Trainer's own order: the model comes first, its arguments second.
            given = dict(zip(("model", "args"), args, strict=False)) | kwargs
            if given.get("args") is not None:
                check_engine(method, engine.asked(given["args"]))
            method.before_task(given["model"], task, self.memory)
            super().__init__(*args, **kwargs)
            engine.check_launch(self.accelerator)
            self.engine = engine.name(self.accelerator)
            check_engine(method, self.engine)
            widen(self.model)
            engine.make_ready(self.accelerator, self.model)
            visit_idle(self.model)
            _guard_tower(self.model, self.data_collator, self.processing_class)
            self.tries_largest = self.args.device.type != "cpu"
            self.measured: Batches | None = None
            self.truth = Truth(self)
            self.add_callback(self.truth)
            self.add_callback(_BeforeStep(self))

        def bare_model(self) -> nn.Module:
            """The model inside the engine's wrappers: hooks and guards live on it."""
            # Asked several times a step, and accelerate looks through all modules each time.
            wrapped = self.model_wrapped
            if self._unwrapped is None or self._unwrapped[0]() is not wrapped:
                bare = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
                self._unwrapped = ref(wrapped), ref(bare)  # which let go of both between tasks
            return self._unwrapped[1]()

        def trained(self) -> dict[str, nn.Parameter]:
            """The parameters that train, by name."""
            return {name: p for name, p in self.bare_model().named_parameters() if p.requires_grad}

        def train(self, *args, **kwargs):
            """Train the task; afterwards the method has measured it and guards start again from
            zero.
            """
            try:
                output = super().train(*args, **kwargs)
            finally:
                self.truth.close()
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

        def batches(self) -> Batches:
            """This rank's share of a fixed seeded selection of the training data, collated."""
            if self.measured is not None:
                return self.measured
            return Calibration(
                self.train_dataset,
                self.data_collator,
                num_tokens=self.method.calibration_tokens,
                batch_size=self.method.calibration_batch or self.args.per_device_train_batch_size,
                seed=self.args.seed,
                name=self.task.name,
                quiet=self.args.disable_tqdm or engine.rank() > 0,
            )

        def prepare_for_evaluation(self) -> None:
            """Bring the model to where it can answer, without an optimizer: for stages that train
            nothing.
            """
            self.model_wrapped = engine.wrap_for_answers(self)

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            """What weight decay falls on: the Trainer's own choice, or all that there is."""
            if self.method.legacy_decay:
                return [name for name, _ in model.named_parameters()]
            return super().get_decay_parameter_names(model)

        def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
            """The Trainer's own, in which what has a rate of its own has a group of its own."""
            made = self.optimizer is None
            optimizer = super().create_optimizer(*args, **kwargs)
            if made and self.method.rates:
                _part(optimizer, self.bare_model(), self.method.rates)
            return optimizer

        def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
            # One door for all engines: the model is wrapped and its optimizer exists, no step was
            # made.
            model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
            bare = self.bare_model()
            engine.check_launch(self.accelerator, bare)
            fill_copy(bare)
            if resume_from_checkpoint is None:
                self.method.start_task(
                    bare, self.task, self.memory, self.batches(), engine.sum_over_ranks
                )
                if self.tries_largest:
                    preflight.push(self)
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
            self.truth.look(inputs)
            self.method.before_forward(self.bare_model(), inputs, self.memory)
            # Outputs that nobody reads are not asked for: TRL would make a second forward for them.
            asks = return_outputs or type(self.method).loss is not Method.loss
            found = super().compute_loss(
                model, inputs, return_outputs=asks, num_items_in_batch=num_items_in_batch
            )
            loss, outputs = found if asks else (found, None)
            loss = loss + self.term(inputs, outputs, num_items_in_batch)
            self._refuse_no_number(loss)
            return (loss, outputs) if return_outputs else loss

        def term(self, inputs, outputs, num_items_in_batch=None) -> Tensor | float:
            """What the method adds to the loss of a micro-batch."""
            extra = self.method.term(self.bare_model(), inputs, outputs, self.memory)
            if extra is None:
                return 0.0
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The Trainer divides the task's loss by the tokens of the whole step, so a term per
                # micro-batch has to be divided by their number.
                return extra / self.current_gradient_accumulation_steps
            return extra

        def _refuse_no_number(self, loss: Tensor) -> None:
            # Before backward: under DeepSpeed that takes the step, and a rank's NaN spreads to all.
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {self.state.global_step + 1} is {float(loss)}; no weight "
                    "has taken it up. Lower the learning rate, or look for a broken sample with "
                    "'mllm-cl data check'; the same command goes on from the last checkpoint."
                )

    Continual.__name__ = Continual.__qualname__ = f"Continual{trainer_class.__name__}"
    return Continual


class _BeforeStep(TrainerCallback):
    """Tells the method of every optimizer step to come; what rests begins anew when it wakes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        method, done = self.trainer.method, state.global_step / state.max_steps
        method.before_step(self.trainer.bare_model(), self.trainer.memory, done)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # Adam counts the steps at rest, of gradient zero, and takes their mean for small: the first
        # ones afterwards would be several times the rate.
        engine.forget(self.trainer.optimizer, resting(self.trainer.bare_model()))


def _part(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split the groups of an optimizer, before its first step, by what has a rate of its own."""
    begins = {
        id(one): next((begin for begin in rates if name.startswith(begin)), "")
        for name, one in model.named_parameters()
    }
    groups = []
    for group in optimizer.param_groups:
        for begin in sorted({begins[id(one)] for one in group["params"]}):
            own = [one for one in group["params"] if begins[id(one)] == begin]
            groups.append({**group, "params": own, "lr": group["lr"] * rates.get(begin, 1.0)})
    # The first one's rate is the one that is logged.
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -group["lr"])


def check_engine(method: Method, name: str) -> None:
    """Raise ValueError for an engine on which the method cannot keep its promise."""
    if name not in method.runs_on:
        raise ValueError(
            f"method {method.name!r} cannot run on {name}: it needs what only "
            f"{', '.join(method.runs_on)} offer. Choose another launch file or another method."
        )


def _guard_tower(model: nn.Module, collator: object, processor: object = None) -> None:
    """Let the vision tower take part in text-only batches, wherever a processor says what it sees.

    A collator of one's own, or a tokenizer, says nothing: such batches are left as they are.
    """
    if isinstance(collator, ChatCollator):
        processor = collator.processor
    if isinstance(processor, ProcessorMixin) and processor.chat_template is not None:
        show_guard_picture(model, picture_inputs(processor))


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

    Every engine of the Trainer will do. Two of them ask for a line more: ZeRO for
    `accelerator.free_memory()` between two tasks on one model, FSDP2 for
    `engine.make_ready(accelerator, model)` before `prepare` if the model lacks blocks that its
    class names, as a LLaVA does.
    Raises ValueError for an engine on which the method cannot keep its promise, for a method that
    asks to be told of optimizer steps, and where what trains is kept in less than fp32.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    engine.check_launch(accelerator, bare)
    check_engine(method, engine.name(accelerator))
    if type(method).before_step is not Method.before_step:
        raise ValueError(
            f"method {method.name!r} acts before every optimizer step, of which only a Trainer can "
            "tell it: use continual(Trainer)"
        )
    check_wide(bare)
    engine.make_ready(accelerator, bare)
    visit_idle(bare)
    _guard_tower(bare, loader.collate_fn)
    # Of the loader only what it draws from: iterating it would advance its random state.
    batches = Calibration(
        loader.dataset,
        loader.collate_fn,
        num_tokens=method.calibration_tokens,
        batch_size=method.calibration_batch or 8,
    )

    def term(inputs: dict[str, Tensor], outputs: object) -> Tensor | float:
        trial.judge()
        trial.look(inputs)
        extra = method.term(bare, inputs, outputs, memory)
        return 0.0 if extra is None else extra

    def meet(model: nn.Module, args: tuple, inputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():  # what a method asks the model itself is no training
            method.before_forward(bare, inputs, memory)

    fill_copy(bare)
    method.start_task(bare, task, memory, batches, engine.sum_over_ranks)
    # In front of the engine's own hooks, which would otherwise find a forward inside a forward.
    meeting = model.register_forward_pre_hook(meet, with_kwargs=True, prepend=True)
    try:
        with Trial(bare) as trial:
            yield term
            trial.judge()
    finally:
        meeting.remove()
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
        name: str = "",
        quiet: bool = True,
    ) -> None:
        self.samples, self.collator, self.batch_size = samples, collator, batch_size
        self.num_tokens, self.seed, self.name, self.quiet = num_tokens, seed, name, quiet

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
        starts = range(0, len(mine), self.batch_size)
        said = f"measuring {self.name}"
        for start in tqdm(starts, desc=said, disable=self.quiet, leave=False):
            yield self._collate(mine[start : start + self.batch_size])

    def _collate(self, indices: list[int]) -> dict[str, Tensor]:
        return self.collator([self.samples[index] for index in indices])
