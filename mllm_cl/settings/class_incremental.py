"""Class-incremental learning: images in, one of all the classes that were seen so far out."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_cl.data.classes import stages
from mllm_cl.data.labelled import labelled
from mllm_cl.data.pixels import Epochs, PixelCollator, preset
from mllm_cl.drifts import Drift
from mllm_cl.evaluate import Answer
from mllm_cl.features import FeatureBatches, FeatureCache
from mllm_cl.metrics.answers import metric
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import load_encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.layers import State
from mllm_cl.model.load import location
from mllm_cl.model.watch import evaluating
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.settings import Place
from mllm_cl.task import Task, TaskSequence


def tasks_of(recipe: Recipe) -> TaskSequence:
    """A task for each stage: the images of its classes, to train on and to test with."""
    block = recipe.classes
    try:
        sets = {
            split: labelled(block.data, split, size, number=block.number, **block.args)
            for split, size in (("train", block.train_size), ("test", block.eval_size))
        }
        chosen = stages(sets["train"].names, block.first, block.increment, block.order)
    except ValueError as error:
        raise RecipeError("classes.data", str(error)) from None
    return TaskSequence(
        tuple(
            Task(
                each.name,
                index,
                sets["train"].of(names),
                sets["test"].of(names),
                metric("exact_match"),
                labels=names,
            )
            for index, (each, names) in enumerate(zip(recipe.tasks, chosen, strict=False), start=1)
        )
    )


def load(recipe: Recipe, sequence: TaskSequence) -> tuple[nn.Module, PixelCollator]:
    """The backbone without a head, and the collator of what trains."""
    try:
        encoder = load_encoder(recipe.model)
        where = location(recipe.model.model_name_or_path)
        pixels = preset(recipe.classes.preprocessing, where)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error
    model = Classifier(encoder, Prototype(encoder.width))
    return model, PixelCollator(pixels, classes_of(sequence), training=True, seed=recipe.seed)


def classes_of(sequence: TaskSequence, stage: int | None = None) -> tuple[str, ...]:
    """The class names up to a stage, in the order in which they come; None: all."""
    return tuple(name for task in sequence.tasks[:stage] for name in task.labels)


def callbacks(collator: PixelCollator) -> list[TrainerCallback]:
    """The epoch, which training pictures draw from."""
    return [Epochs(collator)]


def measured(place: Place, model: nn.Module, base: set[str]) -> FeatureBatches | None:
    """The features of all images of the stage's task, as the model makes them when asked."""
    if place.stage == 0:
        return None
    task = place.sequence[place.stage - 1]
    return FeatureBatches(lambda: _cache(place, model), task.train, f"{task.name}-train")


def answers(place: Place, model: nn.Module, state: State) -> dict[str, list[Answer]]:
    """The class that the model gives to each test image of every stage so far."""
    names, found = classes_of(place.sequence, place.stage), _cache(place, model)
    return {
        task.name: _answered(model, names, task, *found.of(task.eval, f"{task.name}-test"))
        for task in place.sequence.tasks[: place.stage]
    }


def drift(place: Place, model: nn.Module, state: State) -> Drift:
    """None is told of classifiers yet."""
    return Drift()


def _cache(place: Place, model: nn.Module) -> FeatureCache:
    return FeatureCache(
        Path(place.recipe.output_dir) / "features",
        model,
        replace(place.collator, training=False),
        place.collator.preset.key,
        batch_size=place.recipe.eval.batch_size,
        quiet=place.quiet,
    )


def _answered(
    model: nn.Module, names: tuple[str, ...], task: Task, features_ND: Tensor, labels_N: Tensor
) -> list[Answer]:
    """An answer per image: the class of the largest logit, and the loss on the right one."""
    device = next(model.parameters()).device
    with evaluating(model):
        parts = [model(features=one.to(device)).logits for one in features_ND.split(1024)]
    logits_NC = torch.cat(parts).double().cpu()
    nll_N = torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="none")
    ids = map(task.eval.id, range(len(task.eval)))
    rows = zip(ids, logits_NC.argmax(1), labels_N, nll_N, strict=True)
    return [
        Answer(name, names[given], names[right], float(nll), 1) for name, given, right, nll in rows
    ]
