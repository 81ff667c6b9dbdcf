"""What a recipe would train and what it would take, said before a weight is loaded: the model is
built on the meta device, where tensors have shapes and no memory.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mllm_cl import engine
from mllm_cl.data.chat import ChatCollator
from mllm_cl.memory import Memory
from mllm_cl.model import anatomy, four_bit
from mllm_cl.model.load import empty_model
from mllm_cl.model.surgery import guards
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.settings.instruction import processor_of, tasks_of
from mllm_cl.task import TaskSequence

FEW = 20  # optimizer steps. ours
PROBED = 16  # samples of each task whose lengths are looked at


@dataclass(frozen=True)
class Launch:
    """What a launch file of accelerate says about how a model is spread over processes."""

    engine: str = "single"
    num_processes: int = 1
    mixed_precision: str = "no"

    @classmethod
    def read(cls, path: str | Path) -> "Launch":
        """The launch that a file asks for. RecipeError where it asks for none that we know."""
        path = Path(path)
        try:
            words = dict(yaml.safe_load(path.read_text()))
            processes = int(words.get("num_processes") or 1)
            used = _engine(words, processes, path)
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{error}"
            problem = f"{path} is no launch file of accelerate: {reason}"
            raise RecipeError("launch", problem) from None
        return cls(used, processes, str(words.get("mixed_precision") or "no"))

    def shards(self, what: str) -> int:
        """Over how many processes `weights`, `gradients` or `moments` are cut."""
        cut = {
            "weights": ("zero3", "fsdp2"),
            "gradients": ("zero2", "zero3", "fsdp2"),
            "moments": ("zero1", "zero2", "zero3", "fsdp2"),
        }
        return self.num_processes if self.engine in cut[what] else 1


def _engine(words: Mapping[str, Any], processes: int, path: Path) -> str:
    """The engine that a launch file names, as a run under it would name it."""
    kind = words["distributed_type"]
    if kind == "FSDP":
        return engine.with_fsdp(int(words["fsdp_config"].get("fsdp_version", 1)))
    if kind != "DEEPSPEED":
        return engine.with_zero(0, processes)
    settings = words["deepspeed_config"]
    if file := settings.get("deepspeed_config_file"):
        settings = json.loads((path.parent / file).read_text())["zero_optimization"]
        return engine.with_zero(settings["stage"], processes)
    return engine.with_zero(settings["zero_stage"], processes)


@dataclass(frozen=True)
class Forecast:
    """Shapes of what trains, and bytes: per process on the device, and kept between tasks."""

    parameters: int
    trained: Mapping[str, tuple[int, ...]]
    launch: Launch
    device_bytes: Mapping[str, int]
    kept_bytes: int
    longest: int
    steps: Mapping[str, int]  # of each task
    notes: tuple[str, ...] = field(default=())


def forecast(recipe: Recipe, launch: Launch, longest: int | None = None) -> Forecast:
    """What the first task of `recipe` would take under `launch`, with samples of up to `longest`
    tokens: as many as a few samples have, if None.

    Weights, gradients, Adam's moments and guards are counted from shapes. Activations are an
    estimate for the longest of a few samples: 34 bytes per token, width and layer in 16 bits
    (arXiv:2205.05198 eq. 1 with fused attention), 2 of them kept per layer with gradient
    checkpointing, and the logits in fp32 with their gradient.
    """
    try:
        model = empty_model(recipe.model)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error
    sequence = tasks_of(recipe)
    total = sum(weight.numel() for weight in model.parameters())
    saved = _saved(recipe, launch, model)
    try:
        recipe.method.before_task(model, sequence[0], Memory())
    except ValueError as error:
        raise RecipeError("method", str(error)) from error
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    longest = longest or _longest(recipe, sequence)
    return Forecast(
        parameters=total,
        trained={
            name.removesuffix("_guard.delta"): tuple(weight.shape)
            for name, weight in trained.items()
        },
        launch=launch,
        device_bytes=_device_bytes(recipe, launch, model, longest, saved),
        kept_bytes=recipe.method.forecast_bytes(model, len(sequence)),
        longest=longest,
        steps=_steps_of(recipe, launch, sequence) if trained else {},
    )


def _steps_of(recipe: Recipe, launch: Launch, sequence: TaskSequence) -> dict[str, int]:
    """The steps of each task, or of all together."""
    sizes = {task.name: len(task.train) for task in sequence}
    if recipe.method.trains_once:
        sizes = {"all tasks at once": sum(sizes.values())}
    return {name: steps(recipe, launch, size) for name, size in sizes.items()}


def steps(recipe: Recipe, launch: Launch, samples: int) -> int:
    """Optimizer steps for a task of so many samples, what a method adds to them left out."""
    training = recipe.training
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    size = training.get("per_device_train_batch_size", 8) * launch.num_processes
    batches = -(-samples // size)
    an_epoch = -(-batches // training.get("gradient_accumulation_steps", 1))
    return math.ceil(an_epoch * training.get("num_train_epochs", 3))


def _saved(recipe: Recipe, launch: Launch, model: nn.Module) -> int:
    """The bytes that four bits save, 0 without. RecipeError where the launch cannot have them."""
    if not recipe.model.load_in_4bit:
        return 0
    try:
        four_bit.check_engine(launch.engine)
        return four_bit.saved_bytes(model, recipe.model)
    except ValueError as error:
        raise RecipeError("model.load_in_4bit", str(error)) from error


def _device_bytes(
    recipe: Recipe, launch: Launch, model: nn.Module, longest: int, saved: int
) -> dict[str, int]:
    weights = list(model.parameters())
    number = sum(weight.numel() for weight in weights if weight.requires_grad)
    displaced = sum(one.displacement.nbytes for one in guards(model).values())
    return {
        "frozen weights": (sum(w.nbytes for w in weights if not w.requires_grad) - saved)
        // launch.shards("weights"),
        "trained weights": 4 * number // launch.shards("weights"),
        "gradients": 4 * number // launch.shards("gradients"),
        "Adam's moments": 8 * number // launch.shards("moments"),
        "guards": displaced + recipe.method.forecast_guard_bytes(model),
        "activations (estimate)": _activations(recipe, launch, model, longest),
    }


def _activations(recipe: Recipe, launch: Launch, model: nn.Module, longest: int) -> int:
    text = model.config.get_text_config()
    narrow = launch.mixed_precision in ("bf16", "fp16") or recipe.training.get("bf16")
    narrow = narrow or recipe.model.dtype in ("bfloat16", "float16")
    tokens = longest * recipe.training.get("per_device_train_batch_size", 8)
    per_layer = tokens * text.hidden_size * (1 if narrow else 2)
    if recipe.training.get("gradient_checkpointing"):
        inside = per_layer * (2 * text.num_hidden_layers + 34)
    else:
        inside = per_layer * 34 * text.num_hidden_layers
    return inside + tokens * text.vocab_size * (10 if narrow else 8)


def _longest(recipe: Recipe, sequence: TaskSequence) -> int:
    """Tokens of the longest of the first samples of each task, images included."""
    collate = ChatCollator(processor_of(recipe))
    firsts = [
        [task.train[index] for index in range(min(PROBED, len(task.train)))] for task in sequence
    ]
    return max(collate(first)["input_ids"].shape[1] for first in firsts)


def tell(found: Forecast) -> None:
    """Print a forecast: what trains, and a table of bytes."""
    from rich.console import Console

    console = Console()
    console.print(anatomy.shape_table(found.trained, "trained"))
    number = sum(prod(shape) for shape in found.trained.values())
    print(f"{number:,} of {found.parameters:,} parameters train ({number / found.parameters:.2%})")
    console.print(bytes_table(found.launch, found.device_bytes))
    told = ", ".join(f"{name} {number}" for name, number in found.steps.items())
    print(f"optimizer steps: {told or 'none'}")
    few = [name for name, number in found.steps.items() if number < FEW]
    if few:
        print(f"fewer than {FEW} steps seldom teach anything: {', '.join(few)}")
    print(f"longest sample looked at: {found.longest} tokens")
    print(f"kept between tasks: at most {human(found.kept_bytes)}")


def bytes_table(launch: Launch, device_bytes: Mapping[str, int]):
    """The bytes of a process as a table for rich."""
    from rich.table import Table

    table = Table(title=f"per process: {launch.engine}, {launch.num_processes} processes")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, size in device_bytes.items():
        table.add_row(name, human(size))
    table.add_row("together", human(sum(device_bytes.values())), style="bold")
    return table


def human(size: int) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
