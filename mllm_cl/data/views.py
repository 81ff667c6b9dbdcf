"""Other views of pictures, which a method learns from beside the pictures themselves.

Letters of shapes: C colours, H rows, W columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

Prepare = Callable[[Image.Image], Tensor]

# AutoAugment's policy for ImageNet (arXiv:1805.09501, table 9): of two operations each its
# probability in tenths and its magnitude from 0 to 9, where it has one.
POLICY = (
    (("posterize", 4, 8), ("rotate", 6, 9)),
    (("solarize", 6, 5), ("autocontrast", 6, 0)),
    (("equalize", 8, 0), ("equalize", 6, 0)),
    (("posterize", 6, 7), ("posterize", 6, 6)),
    (("equalize", 4, 0), ("solarize", 2, 4)),
    (("equalize", 4, 0), ("rotate", 8, 8)),
    (("solarize", 6, 3), ("equalize", 6, 0)),
    (("posterize", 8, 5), ("equalize", 10, 0)),
    (("rotate", 2, 3), ("solarize", 6, 8)),
    (("equalize", 6, 0), ("posterize", 4, 6)),
    (("rotate", 8, 8), ("color", 4, 0)),
    (("rotate", 4, 9), ("equalize", 6, 0)),
    (("equalize", 0, 0), ("equalize", 8, 0)),
    (("invert", 6, 0), ("equalize", 10, 0)),
    (("color", 6, 4), ("contrast", 10, 8)),
    (("rotate", 8, 8), ("color", 10, 2)),
    (("color", 8, 8), ("solarize", 8, 7)),
    (("sharpness", 4, 7), ("invert", 6, 0)),
    (("shear", 6, 5), ("equalize", 10, 0)),
    (("color", 4, 0), ("equalize", 6, 0)),
    (("equalize", 4, 0), ("solarize", 2, 4)),
    (("solarize", 6, 5), ("autocontrast", 6, 0)),
    (("invert", 6, 0), ("equalize", 10, 0)),
    (("color", 6, 4), ("contrast", 10, 8)),
    (("equalize", 8, 0), ("equalize", 6, 0)),
)
ENHANCED = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
PLAIN = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
}


class View(Protocol):
    """Another view of a picture, which `prepare` makes pixels (C, H, W) of."""

    def __call__(self, image: Image.Image, prepare: Prepare, rng: Generator) -> Tensor: ...


@dataclass(frozen=True)
class AutoAugment:
    """A pair of operations of `POLICY`, on the picture before it is prepared as for a test."""

    def __call__(self, image: Image.Image, prepare: Prepare, rng: Generator) -> Tensor:
        for name, tenths, magnitude in POLICY[int(rng.integers(len(POLICY)))]:
            # All are drawn, so that what comes later does not depend on what was done.
            done, sign = rng.random() * 10 < tenths, float(rng.choice((-1, 1)))
            image = changed(image, name, magnitude, sign) if done else image
        return prepare(image)


@dataclass(frozen=True)
class Noise:
    """N(0, deviation²) on every pixel as the model sees it, cut off below 0 and above 1.

    So it is in the released code of ENGINE, although pixels that a mean was taken from lie on both
    sides of 0.
    """

    deviation: float = 0.25

    def __call__(self, image: Image.Image, prepare: Prepare, rng: Generator) -> Tensor:
        value_CHW = prepare(image)
        draws_CHW = torch.from_numpy(rng.standard_normal(tuple(value_CHW.shape), dtype="float32"))
        return (value_CHW + self.deviation * draws_CHW).clamp(0, 1)


VIEWS = {"autoaugment": AutoAugment(), "noise": Noise()}


def changed(image: Image.Image, name: str, magnitude: int, sign: float) -> Image.Image:
    """The picture after one operation; `sign` says which way, where there are two."""
    share = magnitude / 9
    if name in PLAIN:
        return PLAIN[name](image)
    if name in ENHANCED:
        return ENHANCED[name](image).enhance(1 + sign * 0.9 * share)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * share))
    if name == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - share)))
    if name == "rotate":
        return image.rotate(sign * 30 * share)
    assert name == "shear", name
    matrix = (1, sign * 0.3 * share, 0, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix)
