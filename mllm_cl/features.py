"""What an encoder makes of a set of images, computed once: by whoever asks first, on all processes
together, and kept in a file.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from mllm_cl import engine
from mllm_cl.data import fingerprint
from mllm_cl.data.ahead import ahead
from mllm_cl.memory import load_tensors, save_tensors
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.watch import evaluating
from mllm_cl.progress import digest
from mllm_cl.task import Sample


class Images(Protocol):
    """A set of images that have ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def id(self, index: int) -> str: ...
    def select(self, places: Iterable[int]) -> "Images": ...


@dataclass(frozen=True)
class FeatureCache:
    """Features of whole sets, a file each: `features` (N, D) in fp32.

    A file is named by all that its features depend on: the encoder's weights, the images' ids and a
    fingerprint of them, and `how`, which names preprocessing and precision. Another file of the
    folder is never read, so none has to be deleted. Each part that an encoder shows side by side
    with others has a file of its own, named by its own weights and those that all share: what an
    adapter of an earlier task makes of a set is not encoded again for a later one. Where pictures
    of a batch share an answer, its size counts, too. `collate` makes what the model takes of
    samples, without anything random. Made anew whenever weights may have moved. `reading`: the
    samples are texts.
    """

    folder: Path
    model: Encoding
    collate: Callable[[Sequence[Sample]], dict[str, Tensor]]
    how: str
    batch_size: int = 64
    quiet: bool = True
    printed: Callable[[Images], str] = fingerprint  # or what knows it already
    reading: bool = False

    def of(self, samples: Images, name: str) -> Tensor:
        """The features (N, D) of all samples, in their order, on every process. Collective.

        FloatingPointError where one is no number.
        """
        parts = self._parts
        files = [f"{name}-{one}.safetensors" for one in self._digests(samples, parts)]
        # What the first process calls them: weights of others may differ from its by the last bit.
        files = engine.gather(files if engine.rank() == 0 else [])
        paths = {part: self.folder / file for part, file in zip(parts, files, strict=True)}
        missing = [part for part in parts if not paths[part].exists()]
        missing = engine.gather(missing if engine.rank() == 0 else [])
        if missing:
            with self.model.encoder.showing(missing):
                features_ND = self._encoded(samples, name)
            for part, own_ND in zip(missing, features_ND.chunk(len(missing), dim=1), strict=True):
                self._write(paths[part], own_ND)
        return torch.cat([load_tensors(path)["features"] for path in paths.values()], dim=1)

    def has(self, samples: Images, name: str) -> bool:
        """Whether the features of all samples are in the folder. Collective."""
        files = [f"{name}-{one}.safetensors" for one in self._digests(samples, self._parts)]
        there = all((self.folder / file).exists() for file in files)
        return engine.gather([there] if engine.rank() == 0 else [])[0]

    def gathered(
        self, samples: Images, name: str, sets: Iterable[tuple[str, Images]] = ()
    ) -> Tensor:
        """As `of`, but what is in the files of `sets`, by their names, is taken from there.
        Collective.
        """
        left = {samples.id(place): place for place in range(len(samples))}
        rows: dict[int, Tensor] = {}
        for other, one in sets:
            inside = {left[one.id(row)]: row for row in range(len(one)) if one.id(row) in left}
            if inside and self.has(one, other):
                features_ND = self.of(one, other)
                rows |= {place: features_ND[row] for place, row in inside.items()}
        rest = [place for place in range(len(samples)) if place not in rows]
        if rest:
            own_ND = self.of(samples.select(rest) if rows else samples, name)
            rows |= dict(zip(rest, own_ND, strict=True))
        return torch.stack([rows[place] for place in range(len(samples))])

    def _encoded(self, samples: Images, name: str) -> Tensor:
        """Each process encodes every `world_size`-th image; a sum with zeros puts them together."""
        mine, size = range(engine.rank(), len(samples), engine.world_size()), self.batch_size
        rounds = -(-len(samples) // (engine.world_size() * size))
        batches = [list(mine[one * size : (one + 1) * size]) for one in range(rounds)]
        # Sharded weights are gathered by all: who has nothing left encodes an image again.
        places = [place for batch in batches for place in batch or [0]]
        prepared = ahead(lambda place: self._inputs(samples[place]), places, 2 * size)
        device, parts = next(self.model.parameters()).device, []
        bar = tqdm(batches, desc=f"encoding {name}", disable=self.quiet, leave=False)
        with evaluating(self.model), closing(prepared):
            for batch in bar:
                each = list(islice(prepared, len(batch) or 1))
                inputs = {key: torch.cat([one[key] for one in each]).to(device) for key in each[0]}
                outputs = self.model(**inputs, only_features=True)
                parts.append((batch, outputs.features.float().cpu()[: len(batch)]))
        engine.shard_again(self.model)
        features_ND = torch.zeros(len(samples), parts[0][1].shape[1])
        for chosen, found_BD in parts:
            features_ND[chosen] = found_BD
        features_ND = engine.sum_over_ranks(features_ND)
        wrong = (~features_ND.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise FloatingPointError(
                f"the features of {len(wrong)} of {len(samples)} samples of {name} are no numbers "
                f"(the first is {samples.id(wrong[0])}): lower the learning rate, or take bf16 or "
                "fp32 in the place of fp16"
            )
        return features_ND

    def _inputs(self, sample: Sample) -> dict[str, Tensor]:
        found = self.collate([sample])
        return {key: value for key, value in found.items() if key != "labels"}

    def _write(self, path: Path, features_ND: Tensor) -> None:
        if engine.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"features": features_ND}, path)
        engine.barrier()

    def _digests(self, samples: Images, parts: Sequence[str]) -> list[str]:
        """What tells a part's features of these samples from all others. Collective."""
        width = self.model.encoder.width // len(parts)
        made_by = f"{self._shared} {width} {self.how} {self.printed(samples)}"
        if self.model.encoder.batchwise:
            made_by += f" {self.batch_size} {engine.world_size()}"
        found = hashlib.sha256(made_by.encode())
        for index in range(len(samples)):
            found.update(f" {samples.id(index)}".encode())
        own = [hashlib.sha256(found.digest() + self._own[part].encode()) for part in parts]
        return [one.hexdigest()[:16] for one in own]

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(self.model.encoder.parts)

    @cached_property
    def _shared(self) -> str:
        """Of everything in the encoder that all parts share, trained or not. Collective."""
        return self._weights(None)

    @cached_property
    def _own(self) -> dict[str, str]:
        """Of what is each part's own. Collective."""
        return {part: self._weights(part) for part in self._parts}

    def _weights(self, part: str | None) -> str:
        weights = self.model.encoder.weights_of(part, reading=self.reading)
        return digest({name: engine.full(one) for name, one in weights.items()})


@dataclass(frozen=True)
class FeatureBatches:
    """This process's share of a set's features, in batches of `features` and `labels`.

    What is in the files of other `sets` is not encoded again. `shown` makes a batch of pictures as
    training sees them in an epoch.
    """

    cache: Callable[[], FeatureCache]
    samples: Images
    labels_N: Tensor
    name: str
    shown: Callable[[Sequence[Sample], int], dict[str, Tensor]]
    sets: Sequence[tuple[str, Images]] = ()
    batch_size: int = 1024

    def pictures(self, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
        """This process's share of the pictures (B, C, H, W), `size` at once over all processes, as
        training sees them: in another order in each epoch. All processes get as many batches; up to
        as many pictures as there are processes are left out of an epoch.
        """
        world = engine.world_size()
        for epoch in range(epochs):
            order = torch.randperm(len(self.samples), generator=seeded(seed, f"{epoch}")).tolist()
            mine = order[: len(order) - len(order) % world][engine.rank() :: world]
            for start in range(0, len(mine), -(-size // world)):
                places = mine[start : start + -(-size // world)]
                samples = [self.samples[place] for place in places]
                yield self.shown(samples, epoch)["pixel_values"]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All features (N, D) and labels (N,), in the order of `samples`, on every process.
        Collective.
        """
        features_ND = self.cache().gathered(self.samples, self.name, self.sets)
        return features_ND, self.labels_N

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        features_ND, _ = self.whole()
        mine = slice(engine.rank(), None, engine.world_size())
        pairs = zip(
            features_ND[mine].split(self.batch_size),
            self.labels_N[mine].split(self.batch_size),
            strict=True,
        )
        for features_BD, labels_B in pairs:
            yield {"features": features_BD, "labels": labels_B}


class Encodable(Sequence):
    """Samples as features, which are made when the training of a task begins, by `Encodes`."""

    def encode(self) -> None:
        """Have the features made. Collective."""
        raise NotImplementedError


class Encoded(Encodable):
    """Samples as features (D,) and the places of their classes, in the place of images and names.

    `batches` are asked once: when the training of a task begins, by `Encodes`. With `viewed` there
    are `views` (C, H, W) of the pictures, too, which are drawn whenever they are asked for.
    """

    def __init__(
        self, batches: FeatureBatches, viewed: Callable[[Sample], Tensor] | None = None
    ) -> None:
        self.batches, self.viewed = batches, viewed

    @cached_property
    def features_ND(self) -> Tensor:
        """The features of all, in their order. Collective."""
        return self.batches.whole()[0]

    def encode(self) -> None:
        """Ask for the features. Collective."""
        assert len(self.features_ND)

    def __len__(self) -> int:
        return len(self.batches.samples)

    def __getitem__(self, index: int) -> Sample:
        found = {"features": self.features_ND[index], "labels": self.batches.labels_N[index]}
        if self.viewed is not None:
            found["views"] = self.viewed(self.batches.samples[index])
        return found

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of `features` (B, D), `labels` (B,) and, if there are any, `views`."""
        return {key: torch.stack([one[key] for one in samples]) for key in samples[0]}


class Encodes(TrainerCallback):
    """Has the features of an `Encodable` set made on the engine, before a worker asks for one."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if isinstance(train_dataloader.dataset, Encodable):
            train_dataloader.dataset.encode()
