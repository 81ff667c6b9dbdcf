"""Small image questions drawn on the spot, so that the quickstart and the tests need no download.

`BASE_SKILLS` is what the shipped bases know; `TOY_TASKS` is what they learn one after another. The
tasks look different but share answers ("red", "4", "left") and wording: plain fine-tuning on
the next one visibly spoils the last.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Painter = Callable[[np.random.Generator, str], Image.Image]
Colour = tuple[int, int, int]

SIDE = 64
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 185),
    "orange": (245, 145, 30),
}
WAYS = {"right": 0.0, "down": 90.0, "left": 180.0, "up": 270.0}  # degrees, y grows downwards
SHAPES = ("circle", "square", "triangle", "cross")
LETTERS = tuple("ACEHKOTX")
WORDS = ("red", "green", "yellow", "up", "left", "circle")
SLANTS = {"flat": 0.0, "falling": 45.0, "upright": 90.0, "rising": 135.0}


def _paper(
    low: int, high: int, rng: np.random.Generator
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(low, high, 3)))
    return image, ImageDraw.Draw(image)


def grainy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Sensor noise of +-6 levels: no two samples are the same picture."""
    pixels = np.asarray(image, dtype=np.int16) + rng.integers(-6, 7, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _any_colour(rng: np.random.Generator) -> Colour:
    return COLOURS[str(rng.choice(list(COLOURS)))]


def _turn(x: float, y: float, degrees: float, centre: tuple[float, float]) -> tuple[float, float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: Colour
) -> None:
    """One of `SHAPES` around (x, y), reaching about r each way."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)


def _write(
    image: Image.Image, text: str, size: int, fill: Colour, rng: np.random.Generator, jitter: int
) -> None:
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    dx, dy = rng.integers(-jitter, jitter + 1, 2)
    origin = ((SIDE - left - right) / 2 + int(dx), (SIDE - top - bottom) / 2 + int(dy))
    ImageDraw.Draw(image).text(origin, text, font=font, fill=fill)


# ---- base skills: one thing (or a few discs) on dark paper ----


@cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """1797 real handwritten digits (UCI, 8x8 grey levels 0..16) and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


def digit_pool(split: str) -> np.ndarray:
    """Which handwritten digits a split may draw.

    Every fifth is kept for testing, so that no stroke that is tested was ever trained on.
    """
    held_out = np.arange(len(handwriting()[1])) % 5 == 0
    return np.flatnonzero(held_out == (split == "test"))


def _paint_digit(rng: np.random.Generator, answer: str, split: str) -> Image.Image:
    images, labels = handwriting()
    pool = digit_pool(split)
    pool = pool[labels[pool] == int(answer)]
    ink = images[int(rng.choice(pool))] / 16 * 255
    side = int(rng.integers(48, 61))
    glyph = Image.fromarray(ink.clip(0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    image, _ = _paper(10, 50, rng)
    corner = tuple(int(v) for v in rng.integers(0, SIDE - side + 1, 2))
    image.paste((230, 230, 230), corner, glyph)
    return image


def _paint_colour(rng: np.random.Generator, answer: str) -> Image.Image:
    image, draw = _paper(10, 50, rng)
    x, y, r = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(9, 18)
    draw_shape(draw, str(rng.choice(SHAPES)), x, y, r, COLOURS[answer])
    return image


def _paint_shape(rng: np.random.Generator, answer: str) -> Image.Image:
    image, draw = _paper(10, 50, rng)
    x, y, r = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(10, 18)
    draw_shape(draw, answer, x, y, r, _any_colour(rng))
    return image


def _paint_count(rng: np.random.Generator, answer: str) -> Image.Image:
    image, draw = _paper(10, 50, rng)
    fill = _any_colour(rng)
    for cell in rng.permutation(9)[: int(answer)]:
        x, y = 12 + 20 * (cell % 3) + rng.uniform(-3, 3), 12 + 20 * (cell // 3) + rng.uniform(-3, 3)
        draw_shape(draw, "circle", x, y, rng.uniform(5, 7), fill)
    return image


def _paint_letter(rng: np.random.Generator, answer: str) -> Image.Image:
    image, _ = _paper(10, 50, rng)
    _write(image, answer, int(rng.integers(38, 51)), (230, 230, 230), rng, 5)
    return image


def _paint_side(rng: np.random.Generator, answer: str) -> Image.Image:
    image, draw = _paper(10, 50, rng)
    x, y = _turn(rng.uniform(17, 23), rng.uniform(-12, 12), WAYS[answer], (32, 32))
    draw_shape(draw, str(rng.choice(SHAPES)), x, y, rng.uniform(5, 9), _any_colour(rng))
    return image


# ---- new tasks: each with a look of its own ----


def _paint_bars(rng: np.random.Generator, answer: str) -> Image.Image:
    """Four bars on white paper, the answer's bar at least 8 px above the others."""
    image, draw = _paper(245, 256, rng)
    highest = rng.uniform(34, 56)
    for slot, name in enumerate(rng.permutation(list(COLOURS)[:4])):
        height = highest if name == answer else rng.uniform(6, highest - 8)
        draw.rectangle((6 + 14 * slot, 60 - height, 16 + 14 * slot, 60), fill=COLOURS[str(name)])
    draw.line((3, 3, 3, 61, 62, 61), fill=(0, 0, 0))
    return image


def _paint_arrow(rng: np.random.Generator, answer: str) -> Image.Image:
    """A white arrow on a blue road sign, up to 15 degrees askew."""
    image, draw = _paper(90, 120, rng)
    centre = (rng.uniform(28, 36), rng.uniform(28, 36))
    draw.ellipse((2, 2, 61, 61), fill=(30, 70, 170))
    angle, size = WAYS[answer] + rng.uniform(-15, 15), rng.uniform(0.8, 1.1)
    outline = [(-20, -4), (2, -4), (2, -13), (22, 0), (2, 13), (2, 4), (-20, 4)]
    draw.polygon(
        [_turn(x * size, y * size, angle, centre) for x, y in outline], fill=(245, 245, 245)
    )
    return image


PIPS = {1: "4", 2: "08", 3: "048", 4: "0268", 5: "02468", 6: "035268"}  # cells of a 3x3 grid


def _paint_dice(rng: np.random.Generator, answer: str) -> Image.Image:
    """A cream die with black pips on green felt, up to 12 degrees askew."""
    image, draw = _paper(30, 60, rng)
    draw.rectangle((0, 0, SIDE, SIDE), fill=(25, 105, 60))
    centre, tilt, half = (
        (rng.uniform(29, 35), rng.uniform(29, 35)),
        rng.uniform(-12, 12),
        rng.uniform(20, 25),
    )
    corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
    draw.polygon([_turn(x, y, tilt, centre) for x, y in corners], fill=(245, 235, 205))
    for cell in map(int, PIPS[int(answer)]):
        offset = half * 0.6
        x, y = _turn((cell % 3 - 1) * offset, (cell // 3 - 1) * offset, tilt, centre)
        draw_shape(draw, "circle", x, y, 4.2, (20, 20, 20))
    return image


def _paint_dial(rng: np.random.Generator, answer: str) -> Image.Image:
    """A round gauge with eight marks and one red hand; mark 8 is at the top, 2 on the right."""
    image, draw = _paper(150, 185, rng)
    centre = (rng.uniform(30, 34), rng.uniform(30, 34))
    x, y = centre
    draw.ellipse(
        (x - 29, y - 29, x + 29, y + 29), fill=(250, 250, 240), outline=(60, 60, 60), width=2
    )
    for mark in range(8):
        spot = _turn(25, 0, 45 * mark, centre)
        draw_shape(draw, "square", *spot, 1, (60, 60, 60))
    angle = 45 * int(answer) - 90 + rng.uniform(-10, 10)
    tip, tail = _turn(rng.uniform(19, 24), 0, angle, centre), _turn(-4, 0, angle, centre)
    draw.line((*tail, *tip), fill=(190, 30, 30), width=4)
    return image


def _paint_word(rng: np.random.Generator, answer: str) -> Image.Image:
    """A printed word on pink paper; the ink is never the colour that the word names."""
    image, _ = _paper(225, 240, rng)
    image.paste((250, 205, 215), (0, 0, SIDE, SIDE))
    ink = COLOURS[
        str(rng.choice([name for name in COLOURS if name not in (answer, "yellow", "orange")]))
    ]
    _write(image, answer, int(rng.integers(17, 20)), ink, rng, 4)
    return image


def _paint_size(rng: np.random.Generator, answer: str) -> Image.Image:
    """Two discs in two corners of grid paper; the answer's is at least 1.5 times as wide."""
    image, draw = _paper(235, 250, rng)
    for line in range(4, SIDE, 8):
        draw.line((line, 0, line, SIDE), fill=(170, 200, 225))
        draw.line((0, line, SIDE, line), fill=(170, 200, 225))
    other = str(rng.choice([name for name in COLOURS if name != answer]))
    large, angle = rng.uniform(14, 18), rng.uniform(0, 360)
    small = large / rng.uniform(1.5, 2.2)
    draw_shape(draw, "circle", *_turn(18, 0, angle, (32, 32)), large, COLOURS[answer])
    draw_shape(draw, "circle", *_turn(-20, 0, angle, (32, 32)), small, COLOURS[other])
    return image


def _paint_tiles(rng: np.random.Generator, answer: str) -> Image.Image:
    """Wallpaper of one small shape, brown on beige."""
    image, draw = _paper(200, 215, rng)
    step, r = rng.uniform(14, 17), rng.uniform(5, 6.5)
    shift = rng.uniform(-6, 6, 2)
    for row in range(6):
        for column in range(6):
            draw_shape(
                draw, answer, column * step + shift[0], row * step + shift[1], r, (105, 70, 45)
            )
    return image


def _paint_stripes(rng: np.random.Generator, answer: str) -> Image.Image:
    """Black and white stripes of any phase, up to 12 degrees askew."""
    angle = math.radians(SLANTS[answer] + rng.uniform(-12, 12))
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin(
        (x * -math.sin(angle) + y * math.cos(angle)) * 2 * math.pi / rng.uniform(9, 15)
        + rng.uniform(0, 6.3)
    )
    grey = (wave > 0) * 200 + 30
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8))


@dataclass(frozen=True)
class Skill:
    """What is asked, what may be answered, and who draws it."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paint: Painter


def _skills(split: str) -> dict[str, Skill]:
    numbers = tuple("0123456789")
    colours, ways = tuple(COLOURS), tuple(WAYS)
    return {
        "digit": Skill(
            ("Which digit is this?", "What digit is shown?"),
            numbers,
            lambda r, a: _paint_digit(r, a, split),
        ),
        "colour": Skill(("Which colour is this?", "What colour is shown?"), colours, _paint_colour),
        "shape": Skill(("Which shape is this?", "What shape is shown?"), SHAPES, _paint_shape),
        "count": Skill(
            ("How many are there?", "What number is shown?"), numbers[1:6], _paint_count
        ),
        "letter": Skill(("Which letter is this?", "What letter is shown?"), LETTERS, _paint_letter),
        "side": Skill(("Which side is this on?", "What side is shown?"), ways, _paint_side),
        "bars": Skill(
            ("Which colour is highest?", "What bar is highest?"), colours[:4], _paint_bars
        ),
        "arrow": Skill(("Which way is this?", "What way is shown?"), ways, _paint_arrow),
        "dice": Skill(
            ("How many pips are there?", "What number of pips is shown?"), numbers[1:7], _paint_dice
        ),
        "dial": Skill(("Which mark is this?", "What mark is shown?"), numbers[1:9], _paint_dial),
        "word": Skill(("Which word is this?", "What word is shown?"), WORDS, _paint_word),
        "size": Skill(("Which colour is larger?", "What disc is larger?"), colours, _paint_size),
        "tiles": Skill(("Which tile is this?", "What tile is shown?"), SHAPES, _paint_tiles),
        "stripes": Skill(
            ("Which slant is this?", "What slant is shown?"), tuple(SLANTS), _paint_stripes
        ),
    }


BASE_SKILLS = ("digit", "colour", "shape", "count", "letter", "side")
# The first five, in this order, are the quickstart's sequence: 120 steps of 48 samples learn each.
TOY_TASKS = ("dial", "bars", "arrow", "dice", "size", "word", "tiles", "stripes")


class ToyTask(Sequence):
    """`size` samples, each drawn when it is asked for.

    The same (name, split, seed, index) gives the same bytes. `shift` is a rule that has changed:
    the same pictures and questions, but each answer is the one `shift` places further on.
    """

    def __init__(self, name: str, split: str, size: int, seed: int, shift: int = 0):
        self.name, self.split, self.size, self.seed = name, split, size, seed
        self.shift = shift
        skill = _skills(split)[name]
        self.answers, self.questions = skill.answers, skill.questions

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"{self.name}/{self.split} has {self.size} samples, not {index}")
        return self._draw(int(index) % self.size)

    def _draw(self, index: int) -> dict:
        skill = _skills(self.split)[self.name]
        origin = [zlib.crc32(self.name.encode()), int(self.split == "test"), self.seed, index]
        rng = np.random.default_rng(origin)
        answer, question = str(rng.choice(skill.answers)), str(rng.choice(skill.questions))
        told = skill.answers[(skill.answers.index(answer) + self.shift) % len(skill.answers)]
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        return {
            "id": f"{self.name}-{self.split}-{self.seed}-{index}",
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": told}]},
            ],
            "images": [grainy(skill.paint(rng, answer), rng)],
        }


def toy_task(name: str, split: str, size: int, seed: int = 0, *, shift: int = 0) -> ToyTask:
    """Samples of one skill (`BASE_SKILLS` or `TOY_TASKS`), `split` "train" or "test".

    `shift` exchanges the answers, see `ToyTask`.
    """
    if name not in _skills("train"):
        raise ValueError(
            f"unknown toy task {name!r}; choose one of {', '.join(BASE_SKILLS + TOY_TASKS)}"
        )
    if split not in ("train", "test"):
        raise ValueError(f"toy tasks have the splits 'train' and 'test', not {split!r}")
    return ToyTask(name, split, size, seed, shift)
