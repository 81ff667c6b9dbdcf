"""Labelled pictures without a download: compositions drawn on the spot, and handwritten digits.

A kind is a colour, a texture and a shape: "striped red circle". How many there are and where varies
within it and is told by the caption, or belongs to the class. The kinds of `toy:compositions`
are never shown by `toy:compositions_base`, all of whose colours, textures and shapes they share.
"""

import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageDraw

from mllm_cl.data.errors import DataError
from mllm_cl.data.toy import COLOURS, SHAPES, SIDE, digit_pool, draw_shape, grainy, handwriting
from mllm_cl.model.descriptions import Descriptions

TEXTURES = ("plain", "striped", "dotted", "checked")
COUNTS = ("one", "two", "three")
PLACES = {  # the words, and which way from the middle
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the centre": (0, 0),
}
KINDS = tuple(product(COLOURS, TEXTURES, SHAPES))
HELD_OUT = 20  # kinds that the base never sees
PLACED = 40  # classes of `toy:compositions_placed`
SETS = ("compositions", "compositions_placed", "compositions_base", "digits")
PER_CLASS = {"train": 40, "test": 20}
PER_COMPOSITION = {"train": 4, "test": 1}  # of pictures with captions
PALE = 0.75  # how far a texture's second colour is on the way to white


@dataclass(frozen=True)
class Composition:
    """What a picture shows; a class leaves count and place open or names them."""

    colour: str
    texture: str
    shape: str
    count: str = ""
    place: str = ""

    def __str__(self) -> str:
        """What one says of it, such as "two striped red circles at the top"."""
        texture = "" if self.texture == "plain" else self.texture
        shape = self.shape if self.count in ("", "one") else _plural(self.shape)
        words = (self.count, texture, self.colour, shape, self.place)
        return " ".join(word for word in words if word)


class Drawn:
    """Pictures of compositions, each drawn when it is asked for; with captions.

    The same (class, split, seed, number) gives the same bytes, in any set.
    """

    def __init__(self, classes: tuple[Composition, ...], split: str, size: int, seed: int):
        self.classes, self.split, self.size, self.seed = classes, split, size, seed
        self.names = tuple(map(str, classes))
        self.targets = tuple(np.repeat(np.arange(len(classes)), size).tolist())

    def id(self, index: int) -> str:
        name = self.names[self.targets[index]].replace(" ", "-")
        return f"{name}-{self.split}-{self.seed}-{index % self.size}"

    def place(self, index: int) -> tuple[str, int]:
        return f"compositions, {self.split}", index + 1

    def sample(self, index: int) -> dict[str, object]:
        one = self.classes[self.targets[index]]
        origin = [zlib.crc32(str(one).encode()), int(self.split == "test"), self.seed]
        rng = np.random.default_rng([*origin, index % self.size])
        count = one.count or str(rng.choice(COUNTS))
        place = one.place or str(rng.choice(list(PLACES)))
        shown = Composition(one.colour, one.texture, one.shape, count, place)
        return {"id": self.id(index), "images": [_painted(shown, rng)], "caption": str(shown)}


class Told:
    """Pictures of compositions, each drawn when it is asked for, with two or three captions: in two
    orders of words, and without the texture.
    """

    def __init__(self, shown: Sequence[Composition], split: str):
        self.shown, self.split = shown, split
        self.captions = tuple(map(_captions, shown))

    def id(self, index: int) -> str:
        name = str(self.shown[index]).replace(" ", "-")
        return f"{name}-{self.split}-{index}"

    def place(self, index: int) -> tuple[str, int]:
        return f"compositions, {self.split}", index + 1

    def sample(self, index: int) -> dict[str, object]:
        origin = [zlib.crc32(str(self.shown[index]).encode()), int(self.split == "test"), index]
        image = _painted(self.shown[index], np.random.default_rng(origin))
        return {"id": self.id(index), "images": [image]}


class Digits:
    """1797 real handwritten digits, each once; every fifth is for testing."""

    def __init__(self, split: str, size: int | None):
        labels = handwriting()[1]
        pool, self.split = digit_pool(split), split
        own = [pool[labels[pool] == digit][:size] for digit in range(10)]
        self.names = tuple("0123456789")
        self.chosen = np.concatenate(own).tolist()
        self.targets = tuple(labels[self.chosen].tolist())

    def id(self, index: int) -> str:
        return f"digits-{self.chosen[index]}"

    def place(self, index: int) -> tuple[str, int]:
        return f"digits, {self.split}", index + 1

    def sample(self, index: int) -> dict[str, object]:
        ink = (handwriting()[0][self.chosen[index]] / 16 * 255).astype(np.uint8)
        size = (SIDE, SIDE)
        image = Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC).convert("RGB")
        return {"id": self.id(index), "images": [image]}


def toy_classes(name: str, split: str, size: int | None, seed: int) -> Drawn | Digits:
    """One of `SETS`, with `size` pictures of each class (None: `PER_CLASS`, all digits)."""
    if name not in SETS:
        known = ", ".join(f"toy:{each}" for each in SETS)
        raise DataError(f"there is no toy:{name} of labelled pictures; choose one of {known}")
    if split not in PER_CLASS:
        raise DataError(f"toy:{name} has the splits 'train' and 'test', not {split!r}")
    if name != "digits":
        return Drawn(_classes(name), split, size or PER_CLASS[split], seed)
    try:
        return Digits(split, size)
    except ImportError:
        raise DataError("toy:digits needs scikit-learn: pip install 'mllm_cl[toy]'") from None


def toy_captions(name: str, split: str) -> Told:
    """The compositions of the kinds that the base never sees, in every number and place, in an
    order without order: `PER_COMPOSITION` pictures of each.
    """
    if name != "compositions":
        problem = f"there is no toy:{name} of pictures with captions; there is toy:compositions"
        raise DataError(problem)
    if split not in PER_COMPOSITION:
        raise DataError(f"toy:{name} has the splits 'train' and 'test', not {split!r}")
    every = [
        Composition(*kind, *rest) for kind, *rest in product(_held_out(), COUNTS, PLACES)
    ] * PER_COMPOSITION[split]
    order = np.random.default_rng(300).permutation(len(every)).tolist()
    return Told([every[place] for place in order], split)


def toy_descriptions(name: str) -> Descriptions:
    """What each class of compositions has, by itself, and where it differs from another one."""
    if name not in SETS[:-1]:
        known = ", ".join(f"toy:{each}" for each in SETS[:-1])
        raise DataError(f"there are no descriptions toy:{name}; choose one of {known}")
    own = {str(one): [word for word in astuple(one) if word] for one in _classes(name)}
    pairs: dict[str, dict[str, tuple[str, ...]]] = {one: {} for one in own}
    for one, other in permutations(own, 2):
        pairs[one][other] = tuple(word for word in own[one] if word not in own[other])
    return Descriptions({one: tuple(found) for one, found in own.items()}, pairs)


def words() -> tuple[str, ...]:
    """Every word of the names and captions of compositions, for a tokenizer of them alone."""
    shapes = [word for shape in SHAPES for word in (shape, _plural(shape))]
    places = " ".join(PLACES).split()
    return tuple(dict.fromkeys((*COUNTS, *TEXTURES[1:], *COLOURS, *shapes, *places)))


def _classes(name: str) -> tuple[Composition, ...]:
    stream = _held_out()
    if name == "compositions_base":
        return tuple(Composition(*kind) for kind in KINDS if kind not in stream)
    if name == "compositions":
        return tuple(Composition(*kind) for kind in stream)
    every = [(*kind, *rest) for kind, *rest in product(stream, COUNTS, PLACES)]
    chosen = np.random.default_rng(40).permutation(len(every))[:PLACED]
    return tuple(Composition(*every[k]) for k in sorted(chosen.tolist()))


def _captions(shown: Composition) -> tuple[str, ...]:
    things, plain = replace(shown, place=""), replace(shown, texture="plain")
    return tuple(dict.fromkeys((str(shown), f"{shown.place} {things}", str(plain))))


def _held_out() -> list[tuple[str, str, str]]:
    """`HELD_OUT` kinds in which each colour, texture and shape is about as frequent as another."""
    chosen: list[tuple[str, str, str]] = []
    for number in np.random.default_rng(20).permutation(len(KINDS)).tolist():
        kind = KINDS[number]
        among = [word for each in chosen for word in each]
        if all(
            among.count(word) < -(-HELD_OUT // len(values))
            for word, values in zip(kind, (COLOURS, TEXTURES, SHAPES), strict=True)
        ):
            chosen.append(kind)
    return sorted(chosen, key=KINDS.index)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _painted(shown: Composition, rng: np.random.Generator) -> Image.Image:
    """The things in a row across the way to their place, on dark paper."""
    number = COUNTS.index(shown.count) + 1
    # Apart: the widest two with the least space between them leave a pixel.
    low, high, space = {1: (9, 13, 0), 2: (8, 11, 26), 3: (6.5, 8, 20)}[number]
    across, down = PLACES[shown.place]
    mask = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    for step in range(number):
        offset = (step - (number - 1) / 2) * space
        x = SIDE / 2 + 17 * across + (0 if across else offset) + rng.uniform(-1.5, 1.5)
        y = SIDE / 2 + 17 * down + (offset if across else 0) + rng.uniform(-1.5, 1.5)
        draw_shape(draw, shown.shape, x, y, rng.uniform(low, high), 255)
    paper = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(10, 50, 3).tolist()))
    ink = Image.fromarray(_ink(shown, rng))
    return grainy(Image.composite(ink, paper, mask), rng)


def _ink(shown: Composition, rng: np.random.Generator) -> np.ndarray:
    """A sheet of the colour in its texture, of any phase."""
    first = np.array(COLOURS[shown.colour], dtype=np.float64)
    second = first + PALE * (255 - first)
    y, x = np.mgrid[:SIDE, :SIDE] + rng.integers(0, 6, (2, 1, 1))
    pale = {
        "plain": np.zeros_like(x, dtype=bool),
        "striped": y % 6 < 3,
        "dotted": (x % 6 < 3) & (y % 6 < 3),
        "checked": (x % 8 < 4) ^ (y % 8 < 4),
    }[shown.texture]
    return np.where(pale[..., None], second, first).astype(np.uint8)
