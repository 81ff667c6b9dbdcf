"""Pictures as rows name them, opened by Pillow and turned into RGB; never from outside a folder.

A reference is a path, the bytes of a file, a struct of both (the form of the hub's Parquet files),
an array of pixels, or a picture that is open already.
"""

import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mllm_cl.data.errors import DataError, shortened

# No EPS (Pillow hands it to Ghostscript, a programming language), and none of the rarities.
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB of RGB; checked before anything is decoded
TURNS = {  # EXIF's orientation: what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_SIDE = 4  # image processors take a side of 1 or 3 for the colour channels


def open_picture(reference: object, root: Path | None) -> Image.Image:
    """The picture as RGB, upright, its first frame if it moves; DataError where there is none.

    Paths count from `root` and stay under it.
    """
    with _opened(reference, root) as image:
        try:
            image.load()
        except Exception as error:  # what decoders trip over is as various as what is broken
            raise DataError(f"{_named(reference)} cannot be decoded: {_reason(error)}") from error
        return rgb(_upright(image))


def picture_size(reference: object, root: Path | None) -> tuple[int, int]:
    """Width and height of the upright picture, from its header alone."""
    with _opened(reference, root) as image:
        return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def picture_key(reference: object, root: Path | None) -> str:
    """What tells pictures apart without decoding: the path under `root`, or a hash of bytes."""
    reference = _unpacked(reference)
    if isinstance(reference, (str, os.PathLike)):
        return os.path.relpath(_inside(reference, root), os.path.realpath(root or ""))
    if isinstance(reference, Image.Image):
        reference = reference.tobytes()
    elif not isinstance(reference, bytes):
        reference = _pixels(reference).tobytes()
    return hashlib.sha256(reference).hexdigest()


def rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: 16 bits scaled to 8, transparency on white. DataError for the unclear."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey levels of more than eight bits, which Pillow's own conversion would clip at 255."""
    value_HW = np.asarray(image)
    low, high = (float(value_HW.min()), float(value_HW.max())) if value_HW.size else (0, 0)
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN is neither
            problem = f"has float pixels from {low:g} to {high:g}, expected numbers from 0 to 1"
            raise DataError(f"a picture {problem}")
        value_HW = value_HW * 255
    elif image.mode.startswith("I;16") or image.format == "PNG":
        value_HW = value_HW / 257
    elif low < 0 or high > 255:
        problem = f"has 32-bit pixels from {low:g} to {high:g}, whose range no file says"
        raise DataError(f"a picture {problem}; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(value_HW).astype(np.uint8)).convert("RGB")


@contextmanager
def _opened(reference: object, root: Path | None) -> Iterator[Image.Image]:
    """The picture of a reference with its header read and its size found bearable."""
    reference = _unpacked(reference)
    if isinstance(reference, Image.Image):
        yield _bearable(reference, reference)
    elif isinstance(reference, bytes):
        with io.BytesIO(reference) as file:
            yield _bearable(_parsed(file, reference), reference)
    elif isinstance(reference, (str, os.PathLike)):
        try:
            file = _inside(reference, root).open("rb")
        except OSError as error:
            raise DataError(f"{_named(reference)} cannot be opened: {error.strerror}") from None
        with file:
            yield _bearable(_parsed(file, reference), reference)
    else:
        yield _bearable(Image.fromarray(_pixels(reference)), reference)


def _unpacked(reference: object) -> object:
    if isinstance(reference, Mapping):
        embedded, path = reference.get("bytes"), reference.get("path")
        reference = embedded if embedded is not None else path
    return bytes(reference) if isinstance(reference, (bytearray, memoryview)) else reference


def _parsed(file: io.BufferedIOBase, reference: object) -> Image.Image:
    try:
        return Image.open(file, formats=_kinds())
    except UnidentifiedImageError:
        empty = not file.seek(0, io.SEEK_END)
        problem = "is empty" if empty else f"is none of {', '.join(_kinds())}"
        raise DataError(f"{_named(reference)} {problem}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{_named(reference)} is too large: {error}") from None
    except Exception as error:  # Pillow's parsers raise whatever a broken header makes them trip
        raise DataError(f"{_named(reference)} cannot be read: {_reason(error)}") from error


@cache
def _kinds() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)


def _bearable(image: Image.Image, reference: object) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        problem = f"has {width} x {height} pixels, more than {MAX_PIXELS}; shrink it"
        raise DataError(f"{_named(reference)} {problem}")
    if min(width, height) < MIN_SIDE:
        problem = f"has {width} x {height} pixels, expected at least {MIN_SIDE} each way"
        raise DataError(f"{_named(reference)} {problem}")
    return image


def _inside(reference: str | os.PathLike, root: Path | None) -> Path:
    """The real path of a file under `root`, links followed; DataError for all else."""
    text, name = os.fspath(reference), _named(reference)
    if "://" in text or text.startswith("data:"):
        raise DataError(f"{name} is a URL; download the pictures and give paths of files")
    if root is None:
        raise DataError(f"{name} is a path, but these data are in no folder; set 'image_root'")
    if not text:
        raise DataError("the path of a picture is empty")
    try:
        top, path = os.path.realpath(root), os.path.realpath(os.path.join(root, text))
        if os.path.commonpath([top, path]) != top:
            raise DataError(f"{name} leads out of {root}; set 'image_root' to the pictures' folder")
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise DataError(f"{name} is no file")
    except OSError as error:
        raise DataError(f"{name} cannot be opened in {root}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} is no path: {error}") from None
    return Path(path)


def _pixels(reference: object) -> np.ndarray:
    """An array (H, W) or (H, W, 3) of 0..255 or of floats from 0 to 1 as bytes."""
    if not isinstance(reference, (list, np.ndarray)):
        raise DataError(f"found {shortened(reference)} where a picture is expected")
    try:
        value_HWC = np.asarray(reference)
    except ValueError:
        raise DataError("found a ragged list where the pixels of a picture are expected") from None
    if value_HWC.ndim not in (2, 3) or value_HWC.shape[2:] not in ((), (3,)):
        found = f"an array of shape {value_HWC.shape}"
        raise DataError(f"found {found} where (height, width, 3) is expected")
    floats = value_HWC.dtype.kind == "f"
    top = 1 if floats else 255
    if value_HWC.dtype.kind not in "uif" or not ((value_HWC >= 0) & (value_HWC <= top)).all():
        expected = "whole numbers from 0 to 255 or floats from 0 to 1"
        raise DataError(f"the pixels of a picture are not all {expected}")
    return np.rint(value_HWC * 255 if floats else value_HWC).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    return image.transpose(TURNS[turn]) if (turn := _orientation(image)) in TURNS else image


def _orientation(image: Image.Image) -> object:
    """What the camera noted of how it was held; a broken note is no reason to lose the picture."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # its parser raises as variously as those of pictures
        return 1


def _named(reference: object) -> str:
    if isinstance(reference, Mapping):
        reference = _unpacked(reference)
    if isinstance(reference, (str, os.PathLike)):
        return f"picture {shortened(os.fspath(reference), 120)}"
    return "the picture"


def _reason(error: Exception) -> str:
    return f"{error}" or type(error).__name__
