"""A stage of a run as a classifier of anybody's pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mllm_cl.data.pixels import Preset
from mllm_cl.data.source.images import KINDS
from mllm_cl.memory import Memory
from mllm_cl.metrics.answers import metric
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.encoder import load_encoder
from mllm_cl.model.surgery import restore_state
from mllm_cl.model.watch import evaluating
from mllm_cl.recipe import RecipeError
from mllm_cl.recipe.descriptions import descriptions_of
from mllm_cl.runner import hush
from mllm_cl.settings import opened
from mllm_cl.stage import Stage, complete_stage
from mllm_cl.task import Task

AT_ONCE = 64  # pictures in a forward


@dataclass(frozen=True)
class StageClassifier:
    """What a run had learnt after a stage: pictures in, one of `names` out.

    `pixels` prepares pictures as the run's tests were.
    """

    model: Classifier
    pixels: Preset
    names: tuple[str, ...]

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """The name that each picture in RGB is given."""
        return [self.names[place] for place in self.logits(images).argmax(1)]

    def logits(self, images: Sequence[Image.Image]) -> Tensor:
        """What the head answers (N, C), in the order of `names`, on the CPU.

        Cosines, distances or the logits of a softmax: whatever the method compares.
        """
        device, found = next(self.model.parameters()).device, []
        with evaluating(self.model):
            for start in range(0, len(images), AT_ONCE):
                pixels_BCHW = torch.stack(
                    list(map(self.pixels.test, images[start : start + AT_ONCE]))
                )
                found.append(self.model(pixel_values=pixels_BCHW.to(device)).logits.float().cpu())
        return torch.cat(found) if found else torch.zeros(0, len(self.names))


def classifier(
    run: Path | str, task: str | None = None, *, trust_remote_code: bool = False
) -> StageClassifier:
    """The classifier of `run` after the stage `task`, as in "11-20"; by default the newest.

    It needs the run's folder and the backbone that the recipe names, and for ENGINE the
    descriptions; no pictures. RecipeError where `run` learnt no classes, or the backbone is
    another than the run's.
    """
    hush()
    stage = complete_stage(Path(run), task, learnt="classes", trust_remote_code=trust_remote_code)
    model, pixels = opened(stage.recipe, load_encoder)
    method, names = stage.recipe.method, stage.classes
    if method.describes:
        model.descriptions = descriptions_of(stage.recipe.classes, names)
    try:
        _learnt(model, stage)
    except ValueError as error:
        raise RecipeError("RUN", str(error)) from error
    return StageClassifier(model.eval().requires_grad_(False), pixels, names)


def _learnt(model: Classifier, stage: Stage) -> None:
    """Bring a model that was just opened to where the stage left it."""
    method, before = stage.recipe.method, Stage(stage.run, stage.number - 1, stage.recipe)
    known = len(before.classes)
    labels = {"labels": stage.classes[known:], "earlier": stage.classes[:known]}
    task = Task(stage.task, stage.number, (), (), metric("exact_match"), **labels)
    method.before_task(model, task, Memory.load(before.path / "memory.safetensors"))
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    method.recall(model, task, Memory.load(stage.path / "memory.safetensors"))
    restore_state(model, stage.state)


def pictures(places: Sequence[str]) -> list[Path]:
    """The files that are named, and those in the folders that are, in the order of their names.
    RecipeError for a place that is not there, or has none.
    """
    ends = {end for end, kind in Image.registered_extensions().items() if kind in KINDS}
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise RecipeError("PICTURE", f"{place} is not there")
        inside = [place]
        if place.is_dir():
            inside = sorted(one for one in place.rglob("*") if one.suffix.lower() in ends)
        if not inside:
            raise RecipeError("PICTURE", f"{place} has no picture in it")
        found += inside
    return found
