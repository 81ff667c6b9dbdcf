"""A run is a fold over tasks, and its state is a folder: each stage starts from the folder of the
one before.

task_0/ the incoming model: zero-shot scores and, with `retain:`, what it already knows
task_1/ … the first task …, each with state, memory, predictions, drift and, last, scores.json
"""

import contextlib
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from mllm_cl import checkpoint, engine, record
from mllm_cl.data import read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.evaluate import Answer, answers
from mllm_cl.memory import Memory, load_tensors
from mllm_cl.metrics.answers import metric
from mllm_cl.metrics.scores import ZERO_SHOT
from mllm_cl.model import anatomy
from mllm_cl.model.adapt import resting_experts
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.model.surgery import restore_state, trained_state
from mllm_cl.model.watch import routing
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.report import draw, show
from mllm_cl.task import Sample, Task, TaskSequence
from mllm_cl.trainer import continual

PROBE_SAMPLES = 32  # per task, on which routing is compared between stages


def run(recipe: Recipe) -> Path:
    """Train and score the tasks of `recipe` in turn; stages that are done are not done again.

    Under ZeRO-3 the process runs the caller's own command again after each task (see
    `_start_afresh`), so what comes before this call has to bear that.
    Returns the output folder, whose `scores.json` holds the matrix. Collective: every process of a
    launch calls it.
    """
    folder = Path(recipe.output_dir)
    sequence = tasks_of(recipe)
    _hush()
    stages = [0, len(sequence)] if recipe.method.trains_once else list(range(len(sequence) + 1))
    for before, stage in zip([None, *stages], stages, strict=False):
        if not _done(recipe, folder, stage):
            _step(recipe, sequence, stage, folder, before)
            if engine.launched_zero_stage() == 3 and stage < stages[-1]:
                _start_afresh()
    if engine.rank() == 0:
        scores = record.scores_of(recipe, folder, stages)
        checkpoint.write_json(folder / "scores.json", scores)
        recipe.save(folder / "recipe.yaml")
        draw(scores, folder / "scores.png")
        show(scores)
    engine.barrier()
    return folder


def _hush() -> None:
    """Bars only where somebody watches, and transformers' advice about its own files nowhere."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def tasks_of(recipe: Recipe) -> TaskSequence:
    """The tasks that a recipe names, with their data."""
    tasks = [_task(block, index + 1, recipe.seed) for index, block in enumerate(recipe.tasks)]
    retain = [_task(block, 0, recipe.seed) for block in recipe.retain]
    return TaskSequence(tuple(tasks), tuple(retain))


def _task(block, index: int, seed: int) -> Task:
    train_size = None if index == 0 else block.train_size
    try:
        train = read(block.data, "train", train_size, seed, **block.args)
        test = read(block.data, "test", block.eval_size, 0, **block.args)
    except ValueError as error:
        raise RecipeError(f"{block.name}.data", str(error)) from None
    return Task(block.name, index, train, test, metric(block.metric))


def _done(recipe: Recipe, folder: Path, stage: int) -> bool:
    """Whether a stage is complete. RecipeError where it was made by a recipe that differs in what
    counts.
    """
    path = record.stage_folder(folder, stage)
    if not (path / "scores.json").exists():
        return False
    written = json.loads((path / "recipe.json").read_text())
    wanted = json.loads(json.dumps(recipe.stage(stage - 1)))
    if written != wanted:
        key = next(
            key for key in sorted({*written, *wanted}) if written.get(key) != wanted.get(key)
        )
        raise RecipeError(
            "output_dir",
            f"{path} was made with another {key!r}: {json.dumps(written.get(key))} there, "
            f"{json.dumps(wanted.get(key))} in this recipe. Choose another output_dir, or go "
            "back to the recipe that is in the folder.",
        )
    return True


def _step(
    recipe: Recipe, sequence: TaskSequence, stage: int, folder: Path, before: int | None
) -> None:
    """One stage: the folder of the stage before it, and the recipe, to its own folder."""
    path, start = record.stage_folder(folder, stage), time.monotonic()
    arguments = _arguments(recipe, path)
    model, processor = load_model(recipe.model), load_processor(recipe.model)
    base = {name for name, _ in model.named_parameters()}
    memory = (
        Memory()
        if before is None
        else Memory.load(record.stage_folder(folder, before) / "memory.safetensors")
    )
    task, samples = _work(recipe, sequence, stage, memory)
    try:
        trainer = continual(Trainer)(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=ChatCollator(processor),
            method=recipe.method,
            task=task,
            memory=memory,
        )
    except ValueError as error:  # settings, model and launch that do not go together
        raise RecipeError("method", str(error)) from error
    if not sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)  # log.json keeps what it would print
    earlier = {}
    if before is not None:
        earlier = load_tensors(record.stage_folder(folder, before) / "state.safetensors")
        restore_state(trainer.model, earlier)
    if stage == 0 and engine.rank() == 0:
        record.tell_what_trains(trainer)
    _train(trainer, stage, samples, path)
    bare = trainer.bare_model()
    given = _score(recipe, _scored(sequence, stage), bare, processor)
    outcome = record.Outcome(
        state=trained_state(bare, base),
        memory=memory,
        probes=_probes(
            bare, processor, (*sequence.retain, *sequence.tasks[:stage]), recipe.eval.batch_size
        ),
        kept=_kept(bare),
        held=record.held(bare, earlier),
        answers=given,
        manifest=record.manifest(recipe, trainer, sequence),
        log=trainer.state.log_history,
    )
    if engine.rank() == 0:
        scores = record.write(folder, outcome, recipe=recipe, sequence=sequence, stage=stage)
        told = "  ".join(f"{name} {score:.3f}" for name, score in scores.items())
        done = f"{stage}/{len(sequence)} {sequence[stage - 1].name if stage else ZERO_SHOT}"
        print(f"{done}: {told}  ({time.monotonic() - start:.0f} s)", flush=True)
        record.tell_what_held(outcome.held)
    engine.barrier()
    _release(trainer)


def _arguments(recipe: Recipe, path: Path) -> TrainingArguments:
    no_terminal = not sys.stderr.isatty()
    settings = {
        "save_total_limit": 2,
        "disable_tqdm": no_terminal or engine.rank() > 0,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        **recipe.training,
    }
    return TrainingArguments(
        output_dir=str(path), seed=recipe.seed, remove_unused_columns=False, **settings
    )


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
    past = sequence.tasks[: stage - 1] if recipe.method.rehearsal else ()
    return task, recipe.method.train_set(task, memory, past)


def _train(trainer, stage: int, samples: Sequence[Sample] | None, path: Path) -> None:
    if stage == 0 or samples is None:
        trainer.prepare_for_evaluation()
        if stage == 0 and samples is not None:
            trainer.measure_task()
        return
    if engine.rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    latest = checkpoint.newest(path) if engine.rank() == 0 else None
    latest = engine.gather([str(latest)] if latest else [])
    trainer.train(resume_from_checkpoint=latest[0] if latest else None)


def _scored(sequence: TaskSequence, stage: int) -> list[Task]:
    """What a stage is scored on: what is retained, what was learnt, and the next task (forward
    transfer).
    """
    tasks = sequence.tasks if stage == 0 else sequence.tasks[: stage + 1]
    return [*sequence.retain, *tasks]


def _score(
    recipe: Recipe, tasks: Sequence[Task], model: nn.Module, processor
) -> dict[str, list[Answer]]:
    """The answers of the model as it is now, by task."""
    quiet = not sys.stderr.isatty() or engine.rank() > 0
    return {
        task.name: answers(
            model,
            processor,
            task.eval,
            batch_size=recipe.eval.batch_size,
            max_new_tokens=recipe.eval.max_new_tokens,
            name=task.name,
            quiet=quiet,
        )
        for task in tasks
    }


def _watched(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model: native ones, and those of mixtures of LoRA experts."""
    mixtures = {path: moe.router for path, moe in resting_experts(model).items()}
    return dict(anatomy.routers(model)) | mixtures


def _kept(model: nn.Module) -> dict[str, int]:
    """The experts per token of each router; two of a mixture of LoRA experts that weighs all."""
    mixtures = {
        path: moe.top_k or min(2, moe.num_experts) for path, moe in resting_experts(model).items()
    }
    return anatomy.top_k(model) | mixtures


def _probes(
    model: nn.Module, processor, learnt: Sequence[Task], batch_size: int
) -> dict[str, torch.Tensor]:
    """Routing probabilities on the first samples of each learnt task, by `task::router`, the same
    on every rank. Collective.
    """
    watched, collate = _watched(model), ChatCollator(processor)
    probes = {}
    for task in learnt if watched else ():
        first = [task.eval[index] for index in range(min(PROBE_SAMPLES, len(task.eval)))]
        parts = range(0, len(first), batch_size)
        batches = [collate(first[start : start + batch_size]) for start in parts]
        for router, probability_TE in routing(model, watched, batches).items():
            probes[f"{task.name}::{router}"] = probability_TE.half()
    return probes


def _release(trainer) -> None:
    """Let go of the model, the optimizer and the engine before the next stage makes new ones."""
    if trainer.engine.startswith("zero") and trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start_afresh() -> None:
    """Go on in a new process image: ZeRO-3 engines outlive `destroy()` and hold on to their memory.

    The launcher sees the same processes. They meet again at a port of their own, since the
    launcher's store still holds the addresses of the old group.
    """
    ports = engine.gather([_free_port()] if engine.rank() == 0 else [])
    engine.barrier()
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
