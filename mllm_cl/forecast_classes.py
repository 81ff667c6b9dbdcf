"""What a recipe of classes, or of images and captions, would learn, stage by stage, and what it
would take, said before a weight is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch.nn import Parameter

from mllm_cl.data.captioned import Captioned
from mllm_cl.data.errors import some
from mllm_cl.forecast import Launch, bytes_table, human, steps
from mllm_cl.memory import Memory
from mllm_cl.model import anatomy
from mllm_cl.model.encoder import empty_encoder
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.heads import Head
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.settings import opened, setting_of
from mllm_cl.task import Task


@dataclass(frozen=True)
class StageForecast:
    """A stage: the classes that it brings, their images, and its optimizer steps."""

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    steps: int


@dataclass(frozen=True)
class ClassForecast:
    """Stages, shapes of what trains in the first of them, and bytes: per process on the device, of
    features on disk, and kept between stages (0 where the method does not say).
    """

    stages: tuple[StageForecast, ...]
    parameters: int
    trained: Mapping[str, tuple[int, ...]]
    launch: Launch
    device_bytes: Mapping[str, int]
    feature_bytes: int
    kept_bytes: int


def forecast_classes(recipe: Recipe, launch: Launch) -> ClassForecast:
    """What the stages of `recipe` would take under `launch`. RecipeError for what cannot be.

    Bytes are counted from shapes, as `mllm_cl.forecast` does; activations are an estimate for
    vision transformers, and 0 for others.
    """
    sequence = setting_of(recipe).tasks_of(recipe)
    model, _ = opened(recipe, empty_encoder)
    _give_numbers(model)
    total = sum(weight.numel() for weight in model.parameters())
    try:
        recipe.method.before_task(model, sequence[0], Memory())
    except ValueError as error:
        raise RecipeError("method", str(error)) from error
    # Some learn of the stage's classes as late as after the task.
    if isinstance(model.head, Head) and not model.head.number:
        model.head.grow(len(sequence[0].labels))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sets = [one for task in sequence for one in (task.train, task.eval)]
    said = [one.captions for one in sets if isinstance(one, Captioned)]
    captions = sum(len(set(chain.from_iterable(one))) for one in said)
    return ClassForecast(
        stages=tuple(_stage(recipe, launch, task, bool(trained)) for task in sequence),
        parameters=total,
        trained={name: tuple(weight.shape) for name, weight in trained.items()},
        launch=launch,
        device_bytes=_device_bytes(recipe, launch, model),
        feature_bytes=4 * (sum(map(len, sets)) + captions) * model.encoder.width,
        kept_bytes=recipe.method.forecast_bytes(model, len(sequence)),
    )


def _give_numbers(model: Encoding) -> None:
    """Zeros in the place of parameters that are one number, such as CLIP's scale: methods read
    what the number is, which a tensor without memory does not say.
    """
    for module in model.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            if one.numel() == 1:
                module.register_parameter(name, Parameter(torch.zeros(one.shape)))


def _stage(recipe: Recipe, launch: Launch, task: Task, trains: bool) -> StageForecast:
    size, method = len(task.train), recipe.method
    # What is rehearsed beside the task's own images is known to a running method alone.
    if not trains or not method.rehearsal and method.train_set(task, Memory(), ()) is None:
        size = 0
    number = steps(recipe, launch, size) if size else 0
    return StageForecast(task.name, task.labels, len(task.train), len(task.eval), number)


def _device_bytes(recipe: Recipe, launch: Launch, model: Encoding) -> dict[str, int]:
    weights = list(model.parameters())
    number = sum(weight.numel() for weight in weights if weight.requires_grad)
    name = str(recipe.training.get("optim", "adamw"))
    adds = "momentum" in str(recipe.training.get("optim_args"))
    state = (4 if adds else 0) if name.startswith("sgd") else 8
    return {
        "frozen weights": sum(w.nbytes for w in weights if not w.requires_grad)
        // launch.shards("weights"),
        "trained weights": 4 * number // launch.shards("weights"),
        "gradients": 4 * number // launch.shards("gradients"),
        "the optimizer's state": state * number // launch.shards("moments"),
        "activations (estimate)": _activations(recipe, launch, model),
    }


def _activations(recipe: Recipe, launch: Launch, model: Encoding) -> int:
    """34 bytes per patch, width and layer in 16 bits, twice that in 32 (arXiv:2205.05198 eq. 1);
    none where the encoder is frozen.
    """
    if not any(weight.requires_grad for weight in model.encoder.parameters()):
        return 0
    config = model.config.to_dict()
    vision = config.get("vision_config") or config
    if not {"patch_size", "hidden_size", "num_hidden_layers"} <= vision.keys():
        return 0
    side = (model.picture_bytes / 3) ** 0.5
    patches = int(side // vision["patch_size"]) ** 2 + 1
    narrow = launch.mixed_precision in ("bf16", "fp16") or recipe.training.get("bf16")
    narrow = narrow or recipe.model.dtype in ("bfloat16", "float16")
    batch = recipe.training.get("per_device_train_batch_size", 8)
    per_layer = batch * patches * vision["hidden_size"] * (1 if narrow else 2)
    kept = 2 if recipe.training.get("gradient_checkpointing") else 34
    return per_layer * kept * vision["num_hidden_layers"]


def tell_classes(found: ClassForecast) -> None:
    """Print a forecast: the stages, what trains, and a table of bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    of_classes = any(stage.classes for stage in found.stages)
    new = ("classes", "new") if of_classes else ()
    table = Table("stage", *new, "train", "test", "steps")
    for stage in found.stages:
        own = (some(stage.classes, 6), len(stage.classes)) if of_classes else ()
        row = (stage.name, *own, stage.train, stage.test, stage.steps)
        table.add_row(*map(str, row))
    console.print(table)
    if found.trained:
        console.print(anatomy.shape_table(found.trained, "trained in the first stage"))
    number = sum(prod(shape) for shape in found.trained.values())
    print(f"{number:,} parameters train; the encoder has {found.parameters:,}")
    console.print(bytes_table(found.launch, found.device_bytes))
    print("that is the first stage: a copy or an adapter that later ones add comes on top")
    what = "image" if of_classes else "image and caption"
    print(f"features on disk, of every {what} once: {human(found.feature_bytes)}")
    if found.kept_bytes:
        print(f"kept between stages: at most {human(found.kept_bytes)}")
