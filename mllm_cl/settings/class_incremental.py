"""Class-incremental learning: images in, one of all the classes that were seen so far out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_cl.data.captioned import Captioned, captioned
from mllm_cl.data.classes import stage_names, stages
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.pairs import PairCollator
from mllm_cl.data.pixels import Epochs, PixelCollator
from mllm_cl.data.views import VIEWS
from mllm_cl.drifts import Drift
from mllm_cl.evaluate import Answer
from mllm_cl.exemplars import Rehearsal
from mllm_cl.features import Encoded, Encodes, FeatureBatches, FeatureCache
from mllm_cl.metrics.answers import metric
from mllm_cl.metrics.stages import ZERO_SHOT_SCORES
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import Encoder, load_encoder
from mllm_cl.model.heads import Prototype
from mllm_cl.model.layers import State
from mllm_cl.model.texts import Reader, load_reader, reads
from mllm_cl.model.watch import evaluating
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.recipe.blocks import ClassesBlock
from mllm_cl.recipe.descriptions import check_descriptions, descriptions_of
from mllm_cl.recipe.texts import check_texts, read_texts
from mllm_cl.settings import Collator, Place, opened
from mllm_cl.task import Sample, Task, TaskSequence
from mllm_cl.zero_shot import alignment, zero_shot


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
    check_texts(recipe, train.names)
    check_scored(block)
    for names, (_, tested) in zip(chosen, pairs, strict=True):
        if not len(tested):
            problem = f"there is no image to test {', '.join(names[:3])} with"
            raise RecipeError("classes.data", problem)
    check_company(recipe, chosen[: len(recipe.tasks)])
    titles, order = stage_names(block.sizes()), [name for names in chosen for name in names]
    every, first = [], 0
    for index, (title, names, pair) in enumerate(zip(titles, chosen, pairs, strict=True), start=1):
        known = {"labels": names, "earlier": tuple(order[:first])}
        every.append(Task(title, index, *pair, metric("exact_match"), **known))
        first += len(names)
    last = len(recipe.tasks)
    sequence = TaskSequence(tuple(every[:last]), later=tuple(every[last:]))
    check_descriptions(block, classes_of(sequence, last), recipe.method.describes)
    return sequence


def check_scored(block: ClassesBlock) -> None:
    """RecipeError for captions that cannot be read."""
    try:
        if block.captions is not None:
            _captioned(block.captions)
    except ValueError as error:
        raise RecipeError("classes.captions", str(error)) from None


def check_company(recipe: Recipe, stages: Sequence[Sequence[str]]) -> None:
    """RecipeError for a class alone in its stage, where the method would learn nothing of it."""
    told_apart = recipe.method.told_apart
    looked = stages if told_apart == "own" else stages[:1] if told_apart else []
    alone = [names[0] for names in looked if len(names) == 1]
    if alone:
        what = {"own": "classes of a stage", "all": "the classes so far"}[told_apart]
        first = alone[0] == stages[0][0] and recipe.classes.first
        raise RecipeError(
            "classes.first" if first else "classes.increment",
            f"leaves {alone[0]} alone in its stage, of which {recipe.method_name} would learn "
            f"nothing: it tells {what} from each other. Choose another number or increment, or "
            "'stages' that end before",
        )


def load(recipe: Recipe, sequence: TaskSequence) -> tuple[nn.Module, PixelCollator]:
    """The backbone without a head, and the collator of what trains."""
    model, pixels = opened(recipe, load_encoder)
    if isinstance(recipe.method, Rehearsal):
        _check_room(recipe, model, len(classes_of(sequence, len(sequence))))
    if recipe.method.describes:
        model.descriptions = descriptions_of(recipe.classes, classes_of(sequence))
    view = VIEWS[recipe.method.view] if recipe.method.view else None
    order = classes_of(sequence)
    return model, PixelCollator(pixels, order, training=True, seed=recipe.seed, view=view)


def _check_room(recipe: Recipe, model: Classifier, classes: int) -> None:
    """RecipeError where there will be no room for an exemplar of each class."""
    try:
        recipe.method.quota(model, classes)
    except ValueError as error:
        raise RecipeError("method", str(error)) from error


def around(recipe: Recipe) -> Callable[[Encoder], Classifier]:
    """A classifier without a head, with what reads class names. RecipeError where the method needs
    a reader and there is none.
    """
    reader = _reader(recipe)
    return lambda encoder: Classifier(encoder, Prototype(encoder.width), reader=reader)


def _reader(recipe: Recipe) -> Reader | None:
    """What makes tokens of class names; None where the model reads none.

    RecipeError where the method needs them.
    """
    try:
        if reads(recipe.model):
            texts = read_texts(recipe.classes.texts)
            return load_reader(recipe.model, recipe.classes.prompts(), texts)
        problem = "the model has no text tower"
    except RecipeError:
        raise
    except ValueError as error:
        problem = str(error)
    for key in ("texts", "captions"):
        if vars(recipe.classes)[key] is not None:
            raise RecipeError(f"classes.{key}", f"found {vars(recipe.classes)[key]}, but {problem}")
    if recipe.method.reads:
        raise RecipeError(
            "model.model_name_or_path",
            f"{recipe.method_name} asks for classes by their names, but {problem}; choose a CLIP "
            "or SigLIP model with its tokenizer",
        )
    return None


def classes_of(sequence: TaskSequence, stage: int | None = None) -> tuple[str, ...]:
    """The class names up to a stage, in the order in which they come; None: all that there are."""
    tasks = (*sequence.tasks, *sequence.later) if stage is None else sequence.tasks[:stage]
    return tuple(name for task in tasks for name in task.labels)


def callbacks(collator: PixelCollator) -> list[TrainerCallback]:
    """The epoch, which training pictures draw from; and features that train are made in time."""
    return [Epochs(collator), Encodes()]


def measured(place: Place, model: nn.Module, trained: Labelled | None) -> FeatureBatches | None:
    """The features of all images of the stage's task, as the model makes them when asked; where a
    method rehearses, of all that it trains on.
    """
    if place.stage == 0:
        return None
    task = place.sequence[place.stage - 1]
    rehearsed = place.recipe.method.rehearsal and trained is not None
    return _batches(place, model, trained if rehearsed else task.train)


def trained(
    place: Place, model: nn.Module, samples: Labelled | None
) -> tuple[Sequence[Sample] | None, Collator]:
    """Features in the place of images, where an image has the same features whenever it trains."""
    steady = model.encoder.steady and place.collator.preset.deterministic
    if place.stage == 0 or samples is None or not steady:
        return samples, place.collator
    viewed = None if place.collator.view is None else place.collator.viewed
    encoded = Encoded(_batches(place, model, samples), viewed)
    return encoded, encoded.collate


def _batches(place: Place, model: nn.Module, samples: Labelled) -> FeatureBatches:
    """Of what a frozen encoder makes of past tasks, the files are there."""
    *past, task = place.sequence.tasks[: place.stage]
    steady = model.encoder.steady
    sets = [(f"{one.name}-train", one.train) for one in past] if steady else []
    labels_N = _labels(place, samples)
    name = f"{task.name}-train"
    shown = partial(_shown, place.collator)
    cache = partial(_cache, place, model)
    return FeatureBatches(cache, samples, labels_N, name, shown, sets)


def _shown(collator: PixelCollator, samples: Sequence[Sample], epoch: int) -> dict[str, Tensor]:
    collator.epoch.fill_(epoch)
    return collator(samples)


def answers(place: Place, model: nn.Module, state: State) -> dict[str, list[Answer]]:
    """The class that the model gives to each test image of every stage so far."""
    names, cache = classes_of(place.sequence, place.stage), _cache(place, model)
    found = {}
    for task in place.sequence.tasks[: place.stage]:
        features_ND = cache.of(task.eval, f"{task.name}-test")
        labels_N = _labels(place, task.eval)
        found[task.name] = _answered(model, names, task, features_ND, labels_N)
    return found


def scores(place: Place, model: nn.Module, given: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Where images and texts lie in one space, the accuracy by name over all classes of the recipe,
    learnt or not: see `zero_shot`.
    """
    captions = place.recipe.classes.captions
    if model.reader is None or not model.encoder.joint:
        if captions is not None:
            problem = "gives features that texts cannot be compared with"
            found = f"{place.recipe.method_name} {problem}: nothing is told of {captions}"
            warnings.warn(f"classes.captions: {found}", stacklevel=2)
        return {}
    sequence, cache = place.sequence, _cache(place, model)
    sets = (
        (cache.of(task.eval, f"{task.name}-test"), _labels(place, task.eval))
        for task in (*sequence.tasks, *sequence.later)
    )
    known = len(classes_of(sequence, place.stage))
    found = zero_shot(model, classes_of(sequence), known, sets)
    if captions is not None:
        found["alignment"] = _alignment(place, model, cache)
    return {ZERO_SHOT_SCORES: found}


def _captioned(data: str) -> Captioned:
    return captioned(data, "train")


def _alignment(place: Place, model: Classifier, cache: FeatureCache) -> float:
    """Of every caption with its image; texts are read as class names are by a method that puts
    learnt words before them, else as they are.
    """
    pairs = place.sequence.once(_captioned, place.recipe.classes.captions)
    said = [caption for captions in pairs.captions for caption in captions]
    reader = model.reader
    own = reader.templates == place.recipe.classes.prompts()
    (template,) = ("{}",) if own else reader.templates
    text_ND = model.read([template.replace("{}", caption) for caption in said])
    images = PairCollator(place.collator.preset, reader.tokens).image
    image_ND = replace(cache, collate=images).of(pairs, "captions")
    number_N = torch.tensor([*map(len, pairs.captions)])
    return alignment(model, image_ND.repeat_interleave(number_N, dim=0), text_ND)


def drift(place: Place, model: nn.Module, state: State) -> Drift:
    """None is told of classifiers yet."""
    return Drift()


def _labels(place: Place, samples: Labelled) -> Tensor:
    """The places of a set's classes in the class order, without opening an image."""
    places = place.collator.places
    return torch.tensor([places[samples.names[target]] for target in samples.targets])


def _cache(place: Place, model: nn.Module) -> FeatureCache:
    return place.features(model, replace(place.collator, training=False))


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
