"""From pictures to pixels: named ways of preparing them for an image encoder, and the collator.

Letters of shapes: B pictures, C colours, H rows, W columns.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, TrainerCallback

from mllm_cl.data.views import View

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
SIDE = 224  # where neither the caller nor the model says


class Preset(Protocol):
    """How pictures are prepared; `deterministic` in training, too, and `key` tells it from others.

    Both return (C, H, W). `rng` is what a training picture may draw from.
    """

    deterministic: ClassVar[bool]

    @property
    def key(self) -> str: ...
    def train(self, image: Image.Image, rng: Generator) -> Tensor: ...
    def test(self, image: Image.Image) -> Tensor: ...


@dataclass(frozen=True)
class PaperCompat:
    """What the tables of pre-trained class-incremental learning use: [0, 1] without mean and std.

    A random crop and flip to train, the middle of the picture to test. At another side than 224
    the middle is as large a part.
    Source: the released code of APER (arXiv:2303.07338) and LAMDA-PILOT.
    """

    side: int = SIDE
    deterministic: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return f"paper_compat-{self.side}"

    def train(self, image: Image.Image, rng: Generator) -> Tensor:
        box = random_box(*image.size, rng)
        # Cropped first: a box given to `resize` would let in what lies around it.
        image = image.crop(box).resize((self.side, self.side), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return scaled(image)

    def test(self, image: Image.Image) -> Tensor:
        short = self.side * 256 // SIDE
        width, height = image.size
        shape = (short, short * height // width), (short * width // height, short)
        image = image.resize(shape[width > height], Image.Resampling.BICUBIC)
        left, top = (round((length - self.side) / 2) for length in image.size)
        return scaled(image.crop((left, top, left + self.side, top + self.side)))


@dataclass(frozen=True)
class Squash:
    """The whole picture as a square whatever its shape, alike to train and to test.

    Source: open_clip's transform in the released code of PROOF (arXiv:2305.19270) and ENGINE.
    """

    name: str
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    deterministic: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return f"{self.name}-{self.side}"

    def train(self, image: Image.Image, rng: Generator) -> Tensor:
        return self.test(image)

    def test(self, image: Image.Image) -> Tensor:
        value_CHW = scaled(image.resize((self.side, self.side), Image.Resampling.BICUBIC))
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (value_CHW - mean) / std


@dataclass(frozen=True)
class Processor:
    """A checkpoint's own image processor, alike to train and to test."""

    processor: BaseImageProcessor
    deterministic: ClassVar[bool] = True

    @property
    def key(self) -> str:
        settings = self.processor.to_json_string().encode()
        return f"processor-{hashlib.sha256(settings).hexdigest()[:16]}"

    def train(self, image: Image.Image, rng: Generator) -> Tensor:
        return self.test(image)

    def test(self, image: Image.Image) -> Tensor:
        value_BCHW = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        if value_BCHW.ndim != 4:
            shape = tuple(value_BCHW.shape)
            raise ValueError(f"the image processor gives {shape}, expected one (3, H, W) a picture")
        return value_BCHW[0]


PRESETS = ("paper_compat", "clip", "siglip", "processor")


def preset(name: str, model: str | Path | None = None, side: int | None = None) -> Preset:
    """One of `PRESETS`; `side`, or else the model's own image size, says how large pictures become.

    The processor is that of the folder or name of a checkpoint, `model`, and has a size of its own.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preprocessing {name!r}; choose one of {', '.join(PRESETS)}")
    if name == "processor":
        if model is None or side is not None:
            raise ValueError("the preset 'processor' is a checkpoint's own: it takes a model alone")
        return _processor(str(model))
    side = side or (SIDE if model is None else _image_size(str(model)))
    if name == "paper_compat":
        return PaperCompat(side)
    mean, std = (CLIP_MEAN, CLIP_STD) if name == "clip" else (HALF, HALF)
    return Squash(name, side, mean, std)


@dataclass(frozen=True, eq=False)
class PixelCollator:
    """Batches labelled samples: pixel_values (B, C, H, W), and labels (B,) that are places in
    `order`, the classes from the first learnt to the last. Where training has a `view`, there are
    `views` (B, C, H, W) of the same pictures, too.

    What a training picture draws depends on `seed`, the epoch and the sample's id alone: not on the
    batch, the process or the loader's worker. `Epochs` says which epoch it is.
    """

    preset: Preset
    order: Sequence[str]
    training: bool = False
    seed: int = 0
    view: View | None = None
    epoch: Tensor = field(init=False)  # in memory that the loader's workers share
    places: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "epoch", torch.zeros((), dtype=torch.int64).share_memory_())
        places = {name: place for place, name in enumerate(self.order)}
        object.__setattr__(self, "places", places)

    def __call__(self, samples: Sequence[Mapping]) -> dict[str, Tensor]:
        pixels = [self._pixels(sample) for sample in samples]
        labels = [self._label(sample) for sample in samples]
        batch = {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}
        if self.training and self.view is not None:
            batch["views"] = torch.stack([self.viewed(sample) for sample in samples])
        return batch

    def viewed(self, sample: Mapping) -> Tensor:
        """The other view (C, H, W) of a sample's picture in this epoch."""
        (image,) = sample["images"]
        rng = draws(self.seed, int(self.epoch), f"{sample['id']} view")
        return self.view(image, self.preset.test, rng)

    def _pixels(self, sample: Mapping) -> Tensor:
        (image,) = sample["images"]
        if not self.training:
            return self.preset.test(image)
        return self.preset.train(image, draws(self.seed, int(self.epoch), sample["id"]))

    def _label(self, sample: Mapping) -> int:
        if sample["label"] not in self.places:
            found = f"sample {sample['id']!r} is of the class {sample['label']!r}"
            raise ValueError(f"{found}, none of the {len(self.places)} classes of this run")
        return self.places[sample["label"]]


class Epochs(TrainerCallback):
    """Tells a collator which epoch begins, in a resumed run as in an unbroken one."""

    def __init__(self, collator: PixelCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # The state counts in fractions, and their last may fall short of a whole by a rounding.
        self.collator.epoch.fill_(int((state.epoch or 0) + 1e-6))


def draws(seed: int, epoch: int, name: str) -> Generator:
    """The random numbers of one picture in one epoch."""
    digest = hashlib.sha256(repr((seed, epoch, name)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def random_box(
    width: int,
    height: int,
    rng: Generator,
    scale: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of the picture with this share of its area and shape.

    What does not fit is drawn again, ten times; then it is the largest middle part that does.
    Source: the random resized crop of "Going deeper with convolutions" as torchvision has it.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            left = int(rng.integers(width - across + 1))
            top = int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    across = min(width, round(height * ratio[1]))
    down = min(height, round(width / ratio[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def scaled(image: Image.Image) -> Tensor:
    """The picture's pixels from 0 to 1, (C, H, W)."""
    value_HWC = torch.from_numpy(np.array(image))
    return value_HWC.permute(2, 0, 1).float() / 255


def _processor(model: str) -> Processor:
    from transformers import AutoImageProcessor

    try:
        return Processor(AutoImageProcessor.from_pretrained(model, backend="pil"))
    except (OSError, ValueError) as error:
        problem = f"{model} has no image processor that can be read: {error}"
        raise ValueError(f"{problem}. Choose another preprocessing than 'processor'") from error


def _image_size(model: str) -> int:
    """The side of the pictures that a model takes; `SIDE` where its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).to_dict()
    size = (config.get("vision_config") or config).get("image_size", SIDE)
    return size if isinstance(size, int) else size[0]
