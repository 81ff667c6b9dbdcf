"""What differs between the kinds of continual run, behind one seam: a module for each
`Method.setting`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_cl import engine, record
from mllm_cl.data import fingerprint
from mllm_cl.data.pixels import SIDE, Preset, preset
from mllm_cl.drifts import Drift
from mllm_cl.evaluate import Answer
from mllm_cl.features import FeatureCache
from mllm_cl.method import Batches
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.layers import State
from mllm_cl.model.load import location
from mllm_cl.recipe import ModelBlock, Recipe, RecipeError
from mllm_cl.task import Sample, TaskSequence

Collator = Callable[[Sequence[Sample]], dict[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """A stage at work: what it is a stage of, its number, and what makes its batches."""

    recipe: Recipe
    sequence: TaskSequence
    stage: int
    collator: Collator
    quiet: bool = True

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return record.stage_folder(Path(self.recipe.output_dir), self.stage)

    @property
    def earlier(self) -> list[Path]:
        """The folders of all stages before it."""
        run = Path(self.recipe.output_dir)
        return [record.stage_folder(run, stage) for stage in range(self.stage)]

    def features(self, model: Encoding, collate: Collator) -> FeatureCache:
        """What the encoder makes of samples as `collate` shows them, kept in the run's folder."""
        recipe = self.recipe
        precision = {key: recipe.training.get(key) for key in ("bf16", "fp16")}
        how = (self.collator.preset.key, precision, engine.asked_precision())
        return FeatureCache(
            Path(recipe.output_dir) / "features",
            model,
            collate,
            f"{how} {recipe.model.attn_implementation}",
            batch_size=recipe.eval.batch_size,
            quiet=self.quiet,
            printed=partial(self.sequence.once, fingerprint),
        )


class Setting(Protocol):
    """What the module of a setting offers."""

    def tasks_of(self, recipe: Recipe) -> TaskSequence:
        """The tasks that a recipe names, with their data. RecipeError."""

    def load(self, recipe: Recipe, sequence: TaskSequence) -> tuple[nn.Module, Collator]:
        """The incoming model, and what makes its batches. RecipeError."""

    def around(self, recipe: Recipe) -> Callable[[Encoder], Encoding]:
        """Of a setting of images: what puts its model around an encoder. RecipeError."""

    def callbacks(self, collator: Collator) -> list[TrainerCallback]:
        """What the Trainer tells of its progress."""

    def measured(
        self, place: Place, model: nn.Module, trained: Sequence[Sample] | None
    ) -> Batches | None:
        """What the method measures of the stage's task; None: a selection of what it trains on,
        which is `trained`.
        """

    def trained(
        self, place: Place, model: nn.Module, samples: Sequence[Sample] | None
    ) -> tuple[Sequence[Sample] | None, Collator]:
        """What the Trainer draws from and what makes its batches, for a stage that trains on
        `samples`.
        """

    def answers(self, place: Place, model: nn.Module, state: State) -> dict[str, list[Answer]]:
        """What the model as it is now, which `state` makes differ from its base, answers to each
        task that the stage is scored on. What an interrupted call had done is not done again.
        Collective.
        """

    def scores(
        self, place: Place, model: nn.Module, given: Mapping[str, Sequence[Answer]]
    ) -> dict[str, Any]:
        """What else a row of scores holds of the model as it is now, and of the answers that it has
        given. Collective.
        """

    def drift(self, place: Place, model: nn.Module, state: State) -> Drift:
        """How far inputs, routers and experts have moved. Collective."""


def opened(recipe: Recipe, encoder_of: Callable[[ModelBlock], Encoder]) -> tuple[Encoding, Preset]:
    """The model of a recipe of images around an encoder as `encoder_of` opens it, before a method
    has changed it, and how its pictures are prepared. RecipeError for settings that do not fit it.
    """
    around = setting_of(recipe).around(recipe)
    try:
        encoder = encoder_of(recipe.model)
        where = location(recipe.model.model_name_or_path)
        pixels = preset(recipe.stream.preprocessing, where)
    except ValueError as error:
        raise RecipeError("model", str(error)) from error
    model = around(encoder)
    model.picture_bytes = pixels.test(Image.new("RGB", (SIDE, SIDE))).numel()
    return model, pixels


def setting_of(recipe: Recipe) -> Setting:
    """The module of the recipe's setting."""
    return importlib.import_module(f"mllm_cl.settings.{recipe.method.setting}")
