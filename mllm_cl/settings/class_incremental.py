"""Class-incremental learning: images in, one of all the classes that were seen so far out."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_cl import engine
from mllm_cl.data.classes import stages
from mllm_cl.data.labelled import Labelled, labelled
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
        train = labelled(block.data, "train", block.train_size, number=block.number, **block.args)
        wanted = block.args | {"classes": list(train.names)}
        test = labelled(block.data, "test", block.eval_size, **wanted)
        chosen = stages(train.names, block.first, block.increment, block.order)
        pairs = [(train.of(names), test.of(names)) for names in chosen]
    except ValueError as error:
        raise RecipeError("classes.data", str(error)) from None
    for names, (_, tested) in zip(chosen, pairs, strict=True):
        if not len(tested):
            problem = f"there is no image to test {', '.join(names[:3])} with"
            raise RecipeError("classes.data", problem)
    tasks = zip(recipe.tasks, chosen, pairs, strict=False)
    return TaskSequence(
        tuple(
            Task(each.name, index, *pair, metric("exact_match"), labels=names)
            for index, (each, names, pair) in enumerate(tasks, start=1)
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


def measured(place: Place, model: nn.Module) -> FeatureBatches | None:
    """The features of all images of the stage's task, as the model makes them when asked."""
    if place.stage == 0:
        return None
    task = place.sequence[place.stage - 1]
    labels_N = _labels(place, task.train)
    return FeatureBatches(lambda: _cache(place, model), task.train, labels_N, f"{task.name}-train")


def answers(place: Place, model: nn.Module, state: State) -> dict[str, list[Answer]]:
    """The class that the model gives to each test image of every stage so far."""
    names, cache = classes_of(place.sequence, place.stage), _cache(place, model)
    found = {}
    for task in place.sequence.tasks[: place.stage]:
        features_ND = cache.of(task.eval, f"{task.name}-test")
        labels_N = _labels(place, task.eval)
        found[task.name] = _answered(model, names, task, features_ND, labels_N)
    return found


def drift(place: Place, model: nn.Module, state: State) -> Drift:
    """None is told of classifiers yet."""
    return Drift()


def _labels(place: Place, samples: Labelled) -> Tensor:
    """The places of a set's classes in the class order, without opening an image."""
    places = place.collator.places
    return torch.tensor([places[samples.names[target]] for target in samples.targets])


def _cache(place: Place, model: nn.Module) -> FeatureCache:
    recipe = place.recipe
    precision = {key: recipe.training.get(key) for key in ("bf16", "fp16")}
    how = (place.collator.preset.key, precision, engine.launched_precision())
    return FeatureCache(
        Path(recipe.output_dir) / "features",
        model,
        replace(place.collator, training=False),
        f"{how} {recipe.model.attn_implementation}",
        batch_size=recipe.eval.batch_size,
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
