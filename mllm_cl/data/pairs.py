"""From images with captions to batches of pairs, and to what encoders take of either side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from mllm_cl.data.pixels import Preset, draws


@dataclass(frozen=True, eq=False)
class PairCollator:
    """Batches each image with one of its captions: pixel_values (B, C, H, W), text_ids (B, L) and
    labels (B,), a number for each image.

    `read` makes `input_ids` of texts, all of one length. Which caption is drawn depends on `seed`,
    the epoch and the image's id alone. So an epoch sees every image once, and a batch has no two
    captions of one image, which would be no negatives of each other; over E epochs each of n
    captions is read about E / n times.
    """

    preset: Preset
    read: Callable[[Sequence[str]], Mapping[str, Tensor]]
    seed: int = 0
    epoch: Tensor = field(init=False)  # in memory that the loader's workers share

    def __post_init__(self) -> None:
        object.__setattr__(self, "epoch", torch.zeros((), dtype=torch.int64).share_memory_())

    def __call__(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        pixels = [self._seen(sample) for sample in samples]
        said = [
            sample["captions"][self.drawn(sample["id"], sample["captions"])] for sample in samples
        ]
        return {"pixel_values": torch.stack(pixels), **self.tokens(said), "labels": labels(samples)}

    def drawn(self, name: str, captions: Sequence) -> int:
        """Which of the captions of an image is read in this epoch."""
        return int(draws(self.seed, int(self.epoch), f"{name} caption").integers(len(captions)))

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model takes of texts."""
        return {"text_ids": self.read(texts)["input_ids"]}

    def image(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        """What the model takes of images when it is tested, or asked for features."""
        return {
            "pixel_values": torch.stack([self.preset.test(one["images"][0]) for one in samples])
        }

    def text(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        """What the model takes of samples `{"text"}`."""
        return self.tokens([one["text"] for one in samples])

    def _seen(self, sample: Mapping) -> Tensor:
        (image,) = sample["images"]
        return self.preset.train(image, draws(self.seed, int(self.epoch), sample["id"]))


@dataclass(frozen=True)
class Texts:
    """Texts as samples, each its own id."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"text": self.texts[index]}

    def id(self, index: int) -> str:
        """The text."""
        return self.texts[index]

    def select(self, places: Iterable[int]) -> "Texts":
        """Some of them."""
        return Texts([self.texts[place] for place in places])


def labels(samples: Sequence[Mapping]) -> Tensor:
    """A number (B,) for each sample that is the same for the same id, in any process."""
    found = (sha256(str(sample["id"]).encode()).digest() for sample in samples)
    return torch.tensor([int.from_bytes(one[:7], "big") for one in found])
