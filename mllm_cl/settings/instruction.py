"""Instruction tuning: questions and pictures in, generated answers out."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from mllm_cl import drifts, record
from mllm_cl.data import fingerprint, read
from mllm_cl.data.chat import ChatCollator
from mllm_cl.data.lengths import Lengths
from mllm_cl.data.policy import for_scoring, for_training
from mllm_cl.evaluate import Answer
from mllm_cl.evaluate import answers as generated
from mllm_cl.metrics.answers import metric
from mllm_cl.model.layers import State
from mllm_cl.model.load import load_model, load_processor
from mllm_cl.progress import Progress, digest, unfinished
from mllm_cl.recipe import Recipe, RecipeError, RetainBlock
from mllm_cl.settings import Collator, Place
from mllm_cl.task import Sample, Task, TaskSequence


def tasks_of(recipe: Recipe) -> TaskSequence:
    """The tasks that a recipe names, with their data."""
    lengths = Lengths(processor_of(recipe)) if recipe.data.max_length else None
    tasks = [_task(block, n, recipe, lengths) for n, block in enumerate(recipe.tasks, start=1)]
    retain = [_task(block, 0, recipe, lengths) for block in recipe.retain]
    return TaskSequence(tuple(tasks), tuple(retain))


def processor_of(recipe: Recipe):
    """The processor of the recipe's model. RecipeError where there is none."""
    try:
        return load_processor(recipe.model)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error


def load(recipe: Recipe, sequence: TaskSequence) -> tuple[nn.Module, ChatCollator]:
    """The incoming model and its collator. RecipeError for settings that do not fit the model."""
    try:
        model = load_model(recipe.model)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error
    return model, ChatCollator(processor_of(recipe))


def callbacks(collator: ChatCollator) -> list[TrainerCallback]:
    """None."""
    return []


def measured(place: Place, model: nn.Module, trained: Sequence[Sample] | None) -> None:
    """A selection of what the method trains on."""


def trained(
    place: Place, model: nn.Module, samples: Sequence[Sample] | None
) -> tuple[Sequence[Sample] | None, Collator]:
    """The samples themselves."""
    return samples, place.collator


def answers(place: Place, model: nn.Module, state: State) -> dict[str, list[Answer]]:
    """The answers of the model as it is now, by task; only those that the same recipe and the same
    weights have not given yet are asked for.
    """
    settings = place.recipe.eval
    made_by = f"{place.recipe.fingerprint(place.stage - 1)} {digest(state)}"
    return {
        task.name: generated(
            model,
            place.collator.processor,
            task.eval,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            progress=Progress(
                unfinished(record.predictions(place.folder, task.name)),
                f"{made_by} {place.sequence.once(fingerprint, task.eval)}",
            ),
            name=task.name,
            quiet=place.quiet,
        )
        for task in _scored(place.sequence, place.stage)
    }


def scores(place: Place, model: nn.Module, given: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Nothing but what answers are scored with."""
    return {}


def drift(place: Place, model: nn.Module, state: State) -> drifts.Drift:
    """The drift of what is retained and what was learnt."""
    return drifts.measure(
        model,
        place.collator,
        (*place.sequence.retain, *place.sequence.tasks[: place.stage]),
        place.earlier,
        state,
        batch_size=place.recipe.eval.batch_size,
        quiet=place.quiet,
    )


def _task(block: RetainBlock, index: int, recipe: Recipe, lengths: Lengths | None) -> Task:
    train_size = None if index == 0 else block.train_size
    try:
        train = read(block.data, "train", train_size, recipe.seed, **block.args)
        test = read(block.data, "test", block.eval_size, 0, **block.args)
        train = for_training(train, recipe.data, lengths)
        test = for_scoring(test, recipe.data, lengths)
    except ValueError as error:
        raise RecipeError(f"{block.name}.data", str(error)) from None
    supersedes = None if index == 0 else block.supersedes
    return Task(block.name, index, train, test, metric(block.metric), supersedes=supersedes)


def _scored(sequence: TaskSequence, stage: int) -> list[Task]:
    """What a stage is scored on: what is retained, what was learnt, and the next task (forward
    transfer); at first all tasks.
    """
    tasks = sequence.tasks if stage == 0 else sequence.tasks[: stage + 1]
    return [*sequence.retain, *tasks]
