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
from mllm_cl.data import fingerprint
from mllm_cl.memory import load_tensors, save_tensors
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.watch import evaluating
from mllm_cl.progress import digest
from mllm_cl.task import Sample


class Images(Protocol):
    """A set of images that have ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def id(self, index: int) -> str: ...


@dataclass(frozen=True)
class FeatureCache:
    """Features of whole sets, a file each: `features` (N, D) in fp32.

    A file is named by all that its features depend on: the encoder's weights, the images' ids and a
    fingerprint of them, and `how`, which names preprocessing and precision. Another file of the
    folder is never read, so none has to be deleted. `collate` makes `pixel_values` of samples,
    without anything random. Made anew whenever weights may have moved.
    """

    folder: Path
    model: Classifier
    collate: Callable[[Sequence[Sample]], dict[str, Tensor]]
    how: str
    batch_size: int = 64
    quiet: bool = True

    def of(self, samples: Images, name: str) -> Tensor:
        """The features (N, D) of all samples, in their order, on every process. Collective.

        FloatingPointError where one is no number.
        """
        file = f"{name}-{self._digest(samples)}.safetensors"
        # What the first process calls it: weights of others may differ from its by the last bit.
        (file,) = engine.gather([file] if engine.rank() == 0 else [])
        path = self.folder / file
        (known,) = engine.gather([path.exists()] if engine.rank() == 0 else [])
        if not known:
            self._write(path, self._encoded(samples, name))
        return load_tensors(path)["features"]

    def _encoded(self, samples: Images, name: str) -> Tensor:
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
                parts.append((chosen, outputs.features.float().cpu()[: len(chosen)]))
        features_ND = torch.zeros(len(samples), parts[0][1].shape[1])
        for chosen, found_BD in parts:
            features_ND[chosen] = found_BD
        features_ND = engine.sum_over_ranks(features_ND)
        wrong = (~features_ND.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise FloatingPointError(
                f"the features of {len(wrong)} of {len(samples)} images of {name} are no numbers "
                f"(the first is {samples.id(wrong[0])}): lower the learning rate, or take bf16 or "
                "fp32 in the place of fp16"
            )
        return features_ND

    def _write(self, path: Path, features_ND: Tensor) -> None:
        if engine.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"features": features_ND}, path)
        engine.barrier()

    def _digest(self, samples: Images) -> str:
        made_by = f"{self._weights} {self.model.encoder.width} {self.how} {fingerprint(samples)}"
        found = hashlib.sha256(made_by.encode())
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
    samples: Images
    labels_N: Tensor
    name: str
    batch_size: int = 1024

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        features_ND = self.cache().of(self.samples, self.name)
        mine = slice(engine.rank(), None, engine.world_size())
        pairs = zip(
            features_ND[mine].split(self.batch_size),
            self.labels_N[mine].split(self.batch_size),
            strict=True,
        )
        for features_BD, labels_B in pairs:
            yield {"features": features_BD, "labels": labels_B}
