"""A run is a fold over tasks, and its state is a folder: each stage starts from the folder of the
one before.

task_0/ the incoming model: zero-shot scores and, with `retain:`, what it already knows
task_1/ … the first task …, each with state, memory, predictions, drift, scores; last complete.json
"""

import contextlib
import gc
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mllm_cl import checkpoint, engine, record, tracking
from mllm_cl.cost import Cost
from mllm_cl.memory import Memory, load_tensors, save_tensors
from mllm_cl.metrics.scores import ZERO_SHOT
from mllm_cl.model import four_bit
from mllm_cl.model.surgery import restore_state, trained_state
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.reload import check_reload
from mllm_cl.report import draw, show
from mllm_cl.settings import Place, setting_of
from mllm_cl.stopping import Stopped, Stopping
from mllm_cl.task import Sample, Task, TaskSequence
from mllm_cl.trainer import check_engine, continual
from mllm_cl.watchdog import LOADING, WRITING, Steps, Watchdog


def run(recipe: Recipe, stopping: Stopping | None = None) -> Path:
    """Train and score the tasks of `recipe` in turn; stages that are done are not done again.

    Under ZeRO-3 the process runs the caller's own command again after each task (see
    `_start_afresh`), so what comes before this call has to bear that.
    With `stopping`, a SIGTERM saves what there is and raises `Stopped`.
    Returns the output folder, whose `scores.json` holds the matrix. Collective: every process of a
    launch calls it.
    """
    folder = Path(recipe.output_dir)
    hush()
    with _watchdog(recipe) as watchdog:
        stages = _stages(recipe, watchdog, stopping)
        if engine.rank() == 0:
            scores = record.scores_of(recipe, folder, stages)
            checkpoint.write_json(folder / "scores.json", scores)
            recipe.save(folder / "recipe.yaml")
            draw(scores, folder / "scores.png")
            show(scores)
            print(f"in {folder}; mllm-cl report {folder} draws it", flush=True)
        engine.barrier()
    return folder


def _stages(recipe: Recipe, watchdog: Watchdog, stopping: Stopping | None) -> list[int]:
    """Do the stages that are not done, and return the numbers of all."""
    sequence = setting_of(recipe).tasks_of(recipe)
    stages = [0, len(sequence)] if recipe.method.trains_once else list(range(len(sequence) + 1))
    for before, stage in zip([None, *stages], stages, strict=False):
        if not record.is_done(recipe, Path(recipe.output_dir), stage):
            used = _step(recipe, sequence, stage, before, watchdog, stopping)
            if engine.outlives_its_task(used) and stage < stages[-1]:
                _start_afresh(watchdog)
    return stages


def measure(recipe: Recipe, path: Path) -> Memory:
    """Write what the model of `recipe` already knows, by its `retain` sets, to the file `path`.

    A recipe with `memory: path` protects it from its first task on. Nothing is trained or scored.
    Collective.
    """
    hush()
    with _watchdog(recipe) as watchdog, tempfile.TemporaryDirectory() as folder:
        sequence, memory = setting_of(recipe).tasks_of(recipe), _incoming(recipe)
        trainer, _ = _trainer(recipe, sequence, 0, Path(folder), memory)
        watchdog.follow(trainer.model)
        trainer.prepare_for_evaluation()
        watchdog.phase("measuring what is known")
        trainer.measure_task()
        watchdog.phase(WRITING)
        if engine.rank() == 0:
            memory.save(path)
            known = ", ".join(block.data for block in recipe.retain)
            print(f"{path}: {memory.num_bytes:,} bytes of {known} for {recipe.method_name}")
        engine.barrier()
        _release(trainer)
    return memory


def _watchdog(recipe: Recipe) -> Watchdog:
    return Watchdog(recipe.training.get("ddp_timeout", TrainingArguments.ddp_timeout))


def _incoming(recipe: Recipe) -> Memory:
    """What is known before the first stage: nothing, or the file that the recipe names."""
    return Memory() if recipe.memory is None else Memory.load(recipe.memory)


def hush() -> None:
    """Bars only where somebody watches, and transformers' advice about its own files nowhere."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _quiet() -> bool:
    """Whether this process shows no bars: one does, where somebody watches."""
    return not sys.stderr.isatty() or engine.rank() > 0


def _step(
    recipe: Recipe,
    sequence: TaskSequence,
    stage: int,
    before: int | None,
    watchdog: Watchdog,
    stopping: Stopping | None,
) -> str:
    """One stage: the folder of the stage before it, and the recipe, to its own folder; returns the
    engine that it ran on.
    """
    folder, cost, setting = Path(recipe.output_dir), Cost(), setting_of(recipe)
    path = record.stage_folder(folder, stage)
    watchdog.phase(LOADING)
    memory = (
        _incoming(recipe)
        if before is None
        else Memory.load(record.stage_folder(folder, before) / "memory.safetensors")
    )
    trainer, base = _trainer(recipe, sequence, stage, path, memory)
    watchdog.follow(trainer.model)
    if stopping is not None:
        trainer.add_callback(_SaveAndStop(stopping))
    trainer.add_callback(Steps(watchdog, trainer))
    if before:  # stage 0 trained nothing
        record.tell_other_batch(folder, before, trainer.args)
    place = Place(recipe, sequence, stage, trainer.data_collator, _quiet())
    earlier = {}
    if before is not None:
        earlier = load_tensors(record.state_file(record.stage_folder(folder, before)))
        restore_state(trainer.model, earlier)
    samples = trainer.train_dataset
    trainer.measured = setting.measured(place, trainer.bare_model(), samples)
    drawn = setting.trained(place, trainer.bare_model(), samples)
    trainer.train_dataset, trainer.data_collator = drawn
    if stage == 0 and engine.rank() == 0:
        if recipe.model.load_in_4bit:
            record.tell_what_is_packed(trainer.model)
        record.tell_what_trains(trainer)
    cost.lap("load")
    watchdog.phase(f"measuring {trainer.task.name}")
    _train(trainer, stage, path)
    cost.lap("train")
    watchdog.phase("scoring")
    bare = trainer.bare_model()
    state = trained_state(bare, base - earlier.keys())  # what was learnt and is frozen now stays
    given = setting.answers(place, bare, state)
    more = setting.scores(place, bare, given)
    cost.lap("score")
    watchdog.phase("measuring drift")
    drift = setting.drift(place, bare, state)
    cost.lap("drift")
    watchdog.phase(WRITING)
    _save_state(trainer, state, record.state_file(path))
    outcome = record.Outcome(
        state=state,
        memory=memory,
        drift=drift,
        held=record.held(bare, earlier),
        answers=given,
        scores=more,
        manifest=record.manifest(recipe, trainer, sequence),
        cost=cost.table(state),
        log=trainer.state.log_history,
    )
    if engine.rank() == 0:
        found = record.write(folder, outcome, recipe=recipe, sequence=sequence, stage=stage)
        told = "  ".join(f"{name} {score:.3f}" for name, score in found["scores"].items())
        done = f"{stage}/{len(sequence)} {sequence[stage - 1].name if stage else ZERO_SHOT}"
        print(f"{done}: {told}  ({cost.total:.0f} s)", flush=True)
        if stage and trainer.state.global_step:
            record.tell_what_was_not_learnt(sequence[stage - 1].name, found)
        record.tell_what_held(outcome.held)
        record.tell_what_is_captured(recipe.method.captured(memory))
        record.tell_what_is_rehearsed(recipe.method, memory)
        values = record.tracked(recipe, folder, stage, outcome)
        tracking.send(values, trainer.args.report_to, folder, stage)
    engine.barrier()
    _release(trainer)
    return trainer.engine


def _save_state(trainer: Trainer, state: dict[str, Tensor], file: Path) -> None:
    """Write what a stage hands on, and read it again where something was learnt. Collective."""
    if engine.rank() == 0:
        save_tensors(state, file)
    engine.barrier()
    if trainer.state.global_step > 0:
        check_reload(trainer, file, state)


def _trainer(
    recipe: Recipe, sequence: TaskSequence, stage: int, path: Path, memory: Memory
) -> tuple[Trainer, set[str]]:
    """The trainer of a stage, with the method's surgery done, and the names of the model's own
    weights.
    """
    arguments = _arguments(recipe, path)
    model, collator = setting_of(recipe).load(recipe, sequence)
    base = {name for name, _ in model.named_parameters()}
    task, samples = _work(recipe, sequence, stage, memory)
    try:
        trainer = continual(Trainer)(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            callbacks=setting_of(recipe).callbacks(collator),
            method=recipe.method,
            task=task,
            memory=memory,
        )
    except ValueError as error:  # settings, model and launch that do not go together
        raise RecipeError("method", str(error)) from error
    if not sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)  # log.json keeps what it would print
    return trainer, base


class _SaveAndStop(TrainerCallback):
    """Ends training after the step in which any process was asked to stop, with a checkpoint."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping, self.leaving = stopping, False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.stopping.waits = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # All have to leave after the same step: they save together.
        self.leaving = engine.any_rank(self.stopping.asked)
        control.should_save |= self.leaving

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.leaving:
            raise Stopped

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stopping.waits = False
        if engine.any_rank(self.stopping.asked):
            raise Stopped


def _arguments(recipe: Recipe, path: Path) -> TrainingArguments:
    """The Trainer's arguments. RecipeError for a launch on which the method keeps no promise."""
    settings = {
        "save_total_limit": 2,
        "disable_tqdm": _quiet(),
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        **engine.launched_precision(),
        **recipe.training,
    }
    arguments = TrainingArguments(
        output_dir=str(path), seed=recipe.seed, remove_unused_columns=False, **settings
    )
    if arguments.n_gpu > 1:
        # Without a launcher the Trainer would copy the model to all of them with every step
        # (DataParallel), and what is put into a forward would go on asking the first one's weights.
        arguments._n_gpu = 1
        print("one of several GPUs is used; 'accelerate launch -m mllm_cl run' uses all")
    try:
        check_engine(recipe.method, engine.asked(arguments))
    except ValueError as error:
        raise RecipeError("method", str(error)) from error
    if recipe.model.load_in_4bit:
        try:
            four_bit.check_engine(engine.asked(arguments))
        except ValueError as error:
            raise RecipeError("model.load_in_4bit", str(error)) from error
    return arguments


def _work(
    recipe: Recipe, sequence: TaskSequence, stage: int, memory: Memory
) -> tuple[Task, Sequence[Sample] | None]:
    """The task of a stage and what to train on; at stage 0 the retained data, measured only."""
    if stage == 0:
        from torch.utils.data import ConcatDataset

        retained = (
            ConcatDataset([task.train for task in sequence.retain]) if sequence.retain else None
        )
        first = sequence[0]
        return Task("retain", 0, first.train, first.eval, first.metric), retained
    task = sequence[stage - 1]
    past = sequence.before(stage) if recipe.method.rehearsal else ()
    return task, recipe.method.train_set(task, memory, past)


def _train(trainer, stage: int, path: Path) -> None:
    samples = trainer.train_dataset
    if stage == 0 or samples is None:
        trainer.prepare_for_evaluation()
        if samples is not None or trainer.measured is not None:
            trainer.measure_task()
        return
    if engine.rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    latest = checkpoint.newest(path) if engine.rank() == 0 else None
    latest = engine.gather([str(latest)] if latest else [])
    if latest:
        try:
            checkpoint.check_batch(trainer.args, Path(latest[0]))
        except ValueError as error:
            raise RecipeError("training", str(error)) from error
        if engine.rank() == 0:
            print(f"{trainer.task.name}: going on from {latest[0]}", flush=True)
    trainer.train(resume_from_checkpoint=latest[0] if latest else None)


def _release(trainer) -> None:
    """Let go of the model, the optimizer and the engine before the next stage makes new ones."""
    trainer.accelerator.free_memory()  # destroys a DeepSpeed engine, too
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start_afresh(watchdog: Watchdog) -> None:
    """Go on in a new process image, since this one's engine holds on to its memory.

    The launcher sees the same processes. They meet again at a port of their own, since the
    launcher's store still holds the addresses of the old group.
    """
    ports = engine.gather([_free_port()] if engine.rank() == 0 else [])
    engine.barrier()
    watchdog.close()
    torch.distributed.destroy_process_group()
    os.environ |= {"MASTER_PORT": str(ports[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if int(name) > 2:  # sockets of the old group would stay open in the new image
            _close_on_exec(int(name))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _close_on_exec(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # the one that listed the folder is closed by now
        os.set_inheritable(descriptor, False)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return opened.getsockname()[1]
