"""What an encoder makes of a set of images, computed once: by whoever asks first, on all processes
together, and kept in a file.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mllm_cl import engine
from mllm_cl.memory import load_tensors, save_tensors
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.watch import evaluating
from mllm_cl.progress import digest
from mllm_cl.task import Sample


class Labelled(Protocol):
    """A set of labelled images."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def id(self, index: int) -> str: ...


@dataclass(frozen=True)
class FeatureCache:
    """Features of whole sets, a file each: `features` (N, D) fp32, `labels` (N,) int64.

    A file is named by all that its features depend on: the encoder's weights, the preprocessing
    and the images' ids. Another file of the folder is never read, so none has to be deleted.
    `collate` makes `pixel_values` and `labels` of samples, without anything random;
    `preprocessing` names what it does. Made anew whenever weights may have moved.
    """

    folder: Path
    model: Classifier
    collate: Callable[[Sequence[Sample]], dict[str, Tensor]]
    preprocessing: str
    batch_size: int = 64
    quiet: bool = True

    def of(self, samples: Labelled, name: str) -> tuple[Tensor, Tensor]:
        """The features and labels of all samples, in their order, on every process. Collective."""
        path = self.folder / f"{name}-{self._digest(samples)}.safetensors"
        known = engine.gather([path.exists()] if engine.rank() == 0 else [])[0]
        if not known:
            self._write(path, *self._encoded(samples, name))
        tensors = load_tensors(path)
        return tensors["features"], tensors["labels"]

    def _encoded(self, samples: Labelled, name: str) -> tuple[Tensor, Tensor]:
        """Each process encodes every `world_size`-th image; a sum with zeros puts them together."""
        mine = range(engine.rank(), len(samples), engine.world_size())
        rounds = -(-len(samples) // (engine.world_size() * self.batch_size))
        device, parts = next(self.model.parameters()).device, []
        bar = tqdm(range(rounds), desc=f"encoding {name}", disable=self.quiet, leave=False)
        with evaluating(self.model):
            for one in bar:
                chosen = list(mine[one * self.batch_size : (one + 1) * self.batch_size])
                # Sharded weights are gathered by all: who has nothing left encodes an image again.
                batch = self.collate([samples[index] for index in chosen or [0]])
                pixels_BCHW = batch["pixel_values"].to(device)
                outputs = self.model(pixel_values=pixels_BCHW, only_features=True)
                found_BD = outputs.features.float().cpu()
                parts.append((chosen, found_BD[: len(chosen)], batch["labels"][: len(chosen)]))
        width = found_BD.shape[1]
        features_ND, labels_N = torch.zeros(len(samples), width), torch.zeros(len(samples)).long()
        for chosen, found_BD, labels_B in parts:
            features_ND[chosen], labels_N[chosen] = found_BD, labels_B
        return engine.sum_over_ranks(features_ND), engine.sum_over_ranks(labels_N)

    def _write(self, path: Path, features_ND: Tensor, labels_N: Tensor) -> None:
        if engine.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"features": features_ND, "labels": labels_N}, path)
        engine.barrier()

    def _digest(self, samples: Labelled) -> str:
        found = hashlib.sha256(f"{self._weights} {self.preprocessing}".encode())
        for index in range(len(samples)):
            found.update(f" {samples.id(index)}".encode())
        return found.hexdigest()[:16]

    @cached_property
    def _weights(self) -> str:
        """Of everything in the encoder, trained or not. Collective."""
        encoder = self.model.encoder
        weights = {name: engine.full(one) for name, one in encoder.named_parameters()}
        return digest(weights | dict(encoder.named_buffers()))


@dataclass(frozen=True)
class FeatureBatches:
    """This process's share of a set's features, in batches of `features` and `labels`."""

    cache: Callable[[], FeatureCache]
    samples: Labelled
    name: str
    batch_size: int = 1024

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        features_ND, labels_N = self.cache().of(self.samples, self.name)
        mine = slice(engine.rank(), None, engine.world_size())
        pairs = zip(
            features_ND[mine].split(self.batch_size),
            labels_N[mine].split(self.batch_size),
            strict=True,
        )
        for features_BD, labels_B in pairs:
            yield {"features": features_BD, "labels": labels_B}
