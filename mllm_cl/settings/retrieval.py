"""Continual cross-modal retrieval: images with captions come in tasks, and each side has to find
the other among all tasks so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mllm_cl import checkpoint, engine
from mllm_cl.data.captioned import Captioned, captioned, cut
from mllm_cl.data.pairs import PairCollator, Texts, labels
from mllm_cl.data.pixels import Epochs
from mllm_cl.drifts import Drift
from mllm_cl.evaluate import Answer
from mllm_cl.features import Encodable, Encodes
from mllm_cl.metrics.answers import metric
from mllm_cl.metrics.recall import RECALL, RECALL_BY_TASK, recalls
from mllm_cl.model.encoder import Encoder, load_encoder
from mllm_cl.model.layers import State
from mllm_cl.model.meeting import Matcher, Meeting
from mllm_cl.model.texts import Reader, load_reader, reads
from mllm_cl.model.watch import evaluating
from mllm_cl.ranking import ranks
from mllm_cl.recipe import Recipe, RecipeError
from mllm_cl.settings import Collator, Place, opened
from mllm_cl.task import Sample, Task, TaskSequence


@dataclass(frozen=True)
class Ranked(Answer):
    """The caption that an image finds first, and its own ones.

    `rank` is that of the best of its own captions among all, `caption_ranks` are those of the image
    among all images, for each of its captions.
    """

    rank: int
    caption_ranks: tuple[int, ...]


def tasks_of(recipe: Recipe) -> TaskSequence:
    """A task for each word: the images whose captions say it, to train on and to test with. Prints
    how many there are, and how many of none.
    """
    block = recipe.retrieval
    sizes = {"train": block.train_size, "test": block.eval_size}
    how = {"given": block.forms, "assign": block.assign}
    try:
        found = {
            side: cut(captioned(block.data, side, **block.args), block.words, size=size, **how)
            for side, size in sizes.items()
        }
    except ValueError as error:
        raise RecipeError("retrieval.data", str(error)) from None
    words = block.words[: block.stages]
    for side, one in found.items():
        empty = [word for word in words if not len(one.tasks[word])]
        if empty:
            problem = f"no image of the split {side!r} says {empty[0]!r} in any form before another"
            raise RecipeError("retrieval.words", f"{problem} word: leave it out, or move it up")
        if engine.rank() == 0:
            told = ", ".join(f"{len(one.tasks[word])} {word}" for word in words)
            print(f"{side}: {told}; {one.dropped} images say none of the words", flush=True)
    pairs = [(found["train"].tasks[word], found["test"].tasks[word]) for word in words]
    named = enumerate(zip(words, pairs, strict=True), start=1)
    return TaskSequence(
        tuple(Task(word, index, *pair, metric("exact_match")) for index, (word, pair) in named)
    )


def load(recipe: Recipe, sequence: TaskSequence) -> tuple[nn.Module, PairCollator]:
    """Both towers with a head that compares what they give, and the collator of what trains."""
    model, pixels = opened(recipe, load_encoder)
    return model, PairCollator(pixels, reader(recipe).tokens, recipe.seed)


def around(recipe: Recipe) -> Callable[[Encoder], Matcher]:
    """Both towers with a head that compares what they give. RecipeError for one tower alone."""
    reader(recipe)
    return lambda encoder: Matcher(
        encoder, Meeting(encoder.width, log_scale=encoder.backbone.logit_scale)
    )


def reader(recipe: Recipe) -> Reader:
    """What makes tokens of captions, all of the model's full length and without a mask: so SigLIP
    learnt to read, and what comes after the end of a text CLIP does not see. A text is then read
    alike beside any other. RecipeError where the model reads none.
    """
    try:
        if reads(recipe.model):
            return replace(load_reader(recipe.model, ("{}",), {}), padded=True)
        problem = "has no text tower"
    except ValueError as error:
        problem = str(error)
    where = recipe.model.model_name_or_path
    raise RecipeError(
        "model.model_name_or_path",
        f"{where}: {problem}; retrieval takes a CLIP or SigLIP model with its tokenizer",
    )


def callbacks(collator: PairCollator) -> list[TrainerCallback]:
    """The epoch, by which captions are drawn; and features that train are made in time."""
    return [Epochs(collator), Encodes()]


def measured(place: Place, model: nn.Module, trained: Sequence[Sample] | None) -> None:
    """Nothing of its own: no method for pairs measures anything."""


def trained(
    place: Place, model: Matcher, samples: Captioned | None
) -> tuple[Sequence[Sample] | None, Collator]:
    """Features in the place of images and captions, where nothing that makes them trains."""
    encoder = model.encoder
    moves = any(one.requires_grad for one in encoder.parameters())
    steady = encoder.steady and not moves and place.collator.preset.deterministic
    if place.stage == 0 or samples is None or not steady:
        return samples, place.collator
    name = f"{place.sequence[place.stage - 1].name}-train"
    encoded = EncodedPairs(samples, place.collator, lambda: _features(place, model, samples, name))
    return encoded, encoded.collate


class EncodedPairs(Encodable):
    """Images and all their captions as features (D,) and (n, D)."""

    def __init__(
        self,
        samples: Captioned,
        collator: PairCollator,
        made: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self.samples, self.collator, self.made = samples, collator, made

    @cached_property
    def features(self) -> list[tuple[Tensor, Tensor]]:
        """Those of each image. Collective."""
        image_ND, text_MD = self.made()
        return list(zip(image_ND, text_MD.split([*map(len, self.samples.captions)]), strict=True))

    def encode(self) -> None:
        """Ask for the features. Collective."""
        assert len(self.features)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image_D, text_nD = self.features[index]
        return {"id": self.samples.id(index), "features": image_D, "text_features": text_nD}

    def collate(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        """A batch of both, with the caption that is drawn in this epoch."""
        drawn = [
            one["text_features"][self.collator.drawn(one["id"], one["text_features"])]
            for one in samples
        ]
        images = torch.stack([one["features"] for one in samples])
        both = {"features": images, "text_features": torch.stack(drawn)}
        return both | {"labels": labels(samples)}


def answers(place: Place, model: Matcher, state: State) -> dict[str, list[Ranked]]:
    """What each test image of the tasks so far finds among all their captions, and each caption
    among all their images. The ids of the stage's own images are written beside it.
    """
    tasks = place.sequence.tasks[: place.stage]
    if not tasks:
        return {}
    _write_ids(place.folder, tasks[-1])
    found = [
        _embedded(model, *_features(place, model, one.eval, f"{one.name}-test")) for one in tasks
    ]
    image_NE, text_ME = (torch.cat(one) for one in zip(*found, strict=True))
    names = [one.eval.id(index) for one in tasks for index in range(len(one.eval))]
    counts = [len(captions) for one in tasks for captions in one.eval.captions]
    owner_N = torch.arange(len(names))
    owner_M = owner_N.repeat_interleave(torch.tensor(counts))
    rank_N, first_N = ranks(image_NE, owner_N, text_ME, owner_M)
    rank_M, _ = ranks(text_ME, owner_M, image_NE, owner_N)
    called = [
        f"{name}#{number}" for name, n in zip(names, counts, strict=True) for number in range(n)
    ]
    own = [tuple(called[i] for i in one) for one in torch.arange(len(called)).split(counts)]
    rows = iter(
        Ranked(name, called[first], own[index], None, 1, int(rank), tuple(mine.tolist()))
        for index, (name, first, rank, mine) in enumerate(
            zip(names, first_N, rank_N, rank_M.split(counts), strict=True)
        )
    )
    return {one.name: list(islice(rows, len(one.eval))) for one in tasks}


def scores(place: Place, model: Matcher, given: Mapping[str, Sequence[Ranked]]) -> dict[str, Any]:
    """Recall both ways, over all tasks so far and by task."""
    if not given:
        return {}
    by_task = {name: _recalls(rows) for name, rows in given.items()}
    return {
        RECALL: _recalls([one for rows in given.values() for one in rows]),
        RECALL_BY_TASK: by_task,
    }


def drift(place: Place, model: nn.Module, state: State) -> Drift:
    """None is told of retrieval yet."""
    return Drift()


def _recalls(rows: Sequence[Ranked]) -> dict[str, float]:
    captions = [rank for one in rows for rank in one.caption_ranks]
    return recalls([one.rank for one in rows], captions)


def _write_ids(folder: Path, task: Task) -> None:
    """Which images are the task's: of the data it has no others."""
    if engine.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sides = {"train": task.train, "test": task.eval}
        found = {side: [one.id(index) for index in range(len(one))] for side, one in sides.items()}
        checkpoint.write_json(folder / "images.json", found)


def _features(place: Place, model: Matcher, samples: Captioned, name: str) -> tuple[Tensor, Tensor]:
    """What the encoder makes of the images (N, D) and of all their captions (M, D), in their order;
    texts that are the same are read once. Collective.
    """
    collator = place.collator
    cache = place.features(model, collator.image)
    said = [caption for captions in samples.captions for caption in captions]
    texts = {text: row for row, text in enumerate(dict.fromkeys(said))}
    words = replace(cache, collate=collator.text, printed=_printed, reading=True)
    text_TD = words.of(Texts(list(texts)), f"{name}-texts")
    return cache.of(samples, name), text_TD[[texts[caption] for caption in said]]


def _printed(texts: Texts) -> str:
    return sha256("\0".join(texts.texts).encode()).hexdigest()


def _embedded(model: Matcher, image_ND: Tensor, text_MD: Tensor) -> tuple[Tensor, Tensor]:
    """What of the images (N, E) and of the texts (M, E) is compared. Collective."""
    device = next(model.parameters()).device
    with evaluating(model):
        images = [model(features=one.to(device)).image_embeds for one in image_ND.split(1024)]
        texts = [model(text_features=one.to(device)).text_embeds for one in text_MD.split(1024)]
    return torch.cat(images).cpu(), torch.cat(texts).cpu()
