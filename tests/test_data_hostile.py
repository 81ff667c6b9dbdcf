"""Whatever a data set holds, a row is a sample or a DataError that says where: never a traceback.

Every case is one bad (or merely odd) thing in the second of three rows, or in a whole file.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mllm_cl.data import read
from mllm_cl.data.errors import DataError
from mllm_cl.data.policy import Tolerant
from own_data import QUESTION, picture, png, write_jsonl, write_parquet, write_pictures


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """What `datasets` converts stays out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def is_named_and_skipped(folder: Path, problem: str, row: int = 2) -> None:
    """The row is a DataError of its file and number; skipping, the next row takes its place."""
    samples = read(str(folder), "train", None, 0)
    with pytest.raises(DataError, match=problem) as caught:
        samples[row - 1]
    assert (Path(caught.value.file).parent, caught.value.row) == (folder, row)
    assert "\n" not in str(caught.value)
    tolerant = Tolerant(samples, 1)
    assert [tolerant[place]["id"] for place in range(len(samples))] == [
        samples[row if place == row - 1 else place]["id"] for place in range(len(samples))
    ]
    assert list(tolerant.problems) == [row - 1]


def write_lines(folder: Path, line: bytes) -> None:
    """A JSON Lines file of a good row, the line, and another good row."""
    (name,) = write_pictures(folder, [0])
    good = json.dumps({"image": name, "question": QUESTION, "answer": "red"}).encode()
    (folder / "train.jsonl").write_bytes(b"\n".join([good, line, good]))


def write_row(folder: Path, **row: object) -> None:
    row = {"image": "images/0.png", "question": QUESTION, "answer": "red", **row}
    kept = {key: value for key, value in row.items() if value != "MISSING"}
    write_lines(folder, json.dumps(kept).encode())


# --- pictures ------------------------------------------------------------------------------------


def grey_16(kind: str) -> bytes:
    levels = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    return png(image=Image.fromarray(levels), kind=kind)


def transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode)
    return png(image=image)


def palette(transparency: int | None = None) -> bytes:
    image = picture(0).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    return png(image=image, **({} if transparency is None else {"transparency": transparency}))


def moving(kind: str) -> bytes:
    return png(kind=kind, save_all=True, append_images=[picture(1), picture(2)])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(image=picture(0).crop((0, 0, 32, 16)), kind="JPEG", exif=exif)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b",\0\0\0\0" + bytes(10)


def floats(values: np.ndarray) -> bytes:
    return png(image=Image.fromarray(values.astype(np.float32)), kind="TIFF")


def archive(kind: str) -> bytes:
    """An archive whose member would land outside of the folder it is unpacked in."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("../../slipped.png", png())
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            member = tarfile.TarInfo("../../slipped.png")
            member.size = len(png())
            file.addfile(member, io.BytesIO(png()))
    return buffer.getvalue()


class Executes:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


PICKLE = pickle.dumps({"train": Executes()})
RED, BLACK, WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)

# what is in the file -> the colour of a pixel in its middle, within what JPEG changes
ODD: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    **{kind: (png(kind=kind), RED) for kind in ("PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP")},
    "JPEG": (png(kind="JPEG", quality=95), RED),
    "JPEG, progressive": (png(kind="JPEG", progressive=True, quality=95), RED),
    "JPEG2000": (png(kind="JPEG2000"), RED),
    "JPEG, CMYK": (png(image=picture(0).convert("CMYK"), kind="JPEG", quality=95), RED),
    "TIFF, CMYK": (png(image=picture(0).convert("CMYK"), kind="TIFF"), RED),
    "PNG, palette": (palette(), RED),
    "PNG, one bit": (png(image=Image.new("1", (32, 32), 1)), WHITE),
    "PNG, grey": (png(image=Image.new("L", (32, 32), 99)), (99, 99, 99)),
    "PNG, grey and alpha": (transparent("LA"), WHITE),
    "PNG, alpha": (transparent("RGBA"), WHITE),
    "PNG, palette and alpha": (png(image=Image.new("P", (32, 32), 0), transparency=0), WHITE),
    "PNG, 16 bits": (grey_16("PNG"), (131, 131, 131)),
    "TIFF, 16 bits": (grey_16("TIFF"), (131, 131, 131)),
    "TIFF, floats": (floats(np.full((32, 32), 0.2)), (51, 51, 51)),
    "GIF, moving": (moving("GIF"), RED),
    "WEBP, moving": (moving("WEBP"), RED),
    "PNG, moving": (moving("PNG"), RED),
    "TIFF, pages": (moving("TIFF"), RED),
    "PNG and more behind": (png() + b"behind" * 99, RED),
    "JPEG, broken note": (png(kind="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95), RED),
    "panorama": (png(image=Image.new("RGB", (3000, 8), RED)), RED),
}
# what is in the file -> what the error says of it
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "one byte": (b"\x89", "is none of"),
    "text": (b"not a picture", "is none of"),
    "a page": (b"<html><img src=x></html>", "is none of"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is none of"),
    "PDF": (b"%PDF-1.7\n", "is none of"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is none of"),
    "PSD": (b"8BPS\0\1" + bytes(40), "is none of"),
    "a script": (b"#!/bin/sh\ntouch executed\n", "is none of"),
    "a pickle": (PICKLE, "is none of"),
    "an array": (b"\x93NUMPY\1\0v\0{'descr': '|O'}", "is none of"),
    "zip": (archive("zip"), "is none of"),
    "tar": (archive("tar"), "is none of"),
    "noise": (bytes(range(256)) * 9, "is none of"),
    "a head only": (png()[:8], "cannot be|is none of"),
    "one pixel": (png(image=Image.new("RGB", (1, 1))), "has 1 x 1 pixels, expected at least"),
    "three rows": (png(image=Image.new("RGB", (64, 3))), "has 64 x 3 pixels, expected at least"),
    "NaN": (floats(np.full((32, 32), np.nan)), "has float pixels from nan to nan"),
    "one NaN": (floats(np.where(np.eye(32), np.nan, 0.5)), "has float pixels from nan"),
    "infinite": (floats(np.full((32, 32), np.inf)), "has float pixels from inf"),
    "large floats": (floats(np.full((32, 32), 99.0)), "has float pixels from 99 to 99"),
    "32 bits": (
        png(image=Image.fromarray(np.full((32, 32), 10**6, np.int32)), kind="TIFF"),
        "has 32-bit pixels",
    ),
    "PNG bomb": (png_header(50_000, 50_000), "is too large|more than"),
    "PNG, just too large": (png_header(10_000, 9_000), "more than"),  # Pillow only warns
    "BMP bomb": (bmp_header(40_000, 40_000), "is too large|more than"),
    "GIF bomb": (gif_header(65_535, 65_535), "is too large|more than"),
    "PPM bomb": (b"P6 60000 60000 255\n" + bytes(99), "is too large|more than"),
    "PNG without a size": (png_header(0, 0), "has 0 x 0|cannot be|is none of"),
    "PNG without pixels": (png_header(100, 100), "cannot be decoded"),
}
WAYS = ("path", "bytes")


def write_picture(folder: Path, data: bytes, way: str, name: str = "images/odd.png") -> None:
    """The picture as the second of three, in a file or in the row itself."""
    if way == "path":
        write_row(folder, image=name)
        (folder / name).write_bytes(data)
    else:
        images = [{"bytes": each, "path": None} for each in (png(0), data, png(5))]
        rows = [{"image": image, "question": QUESTION, "answer": "red"} for image in images]
        write_parquet(folder / "train.parquet", rows)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_an_odd_picture_is_seen_as_it_is_meant(tmp_path, name, way):
    data, colour = ODD[name]
    write_picture(tmp_path, data, way)
    samples = read(str(tmp_path), "train", None, 0)
    (image,) = samples[1]["images"]
    assert image.mode == "RGB"
    found = image.getpixel((image.width // 2 + 5, image.height // 2))
    assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 3
    assert samples.outline(1)["sizes"] == [image.size]


@pytest.mark.parametrize("way", WAYS)
def test_a_turned_picture_is_brought_upright(tmp_path, way):
    write_picture(tmp_path, turned(), way)
    samples = read(str(tmp_path), "train", None, 0)
    assert samples[1]["images"][0].size == (16, 32)
    assert samples.outline(1)["sizes"] == [(16, 32)]


@pytest.mark.parametrize("ending", ["jpg", "txt", "json", "gif", "exe"])
def test_the_ending_of_a_picture_says_nothing(tmp_path, ending):
    write_picture(tmp_path, png(), "path", f"images/odd.{ending}")
    assert read(str(tmp_path), "train", None, 0)[1]["images"][0].tobytes() == picture(0).tobytes()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_is_named(tmp_path, monkeypatch, name, way):
    data, problem = BAD[name]
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path, data, way)
    is_named_and_skipped(tmp_path, problem)
    assert not (tmp_path / "executed").exists()


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


def is_a_sample_or_named(folder: Path) -> None:
    """What was damaged is a picture of some size, or an error with its place."""
    samples = read(str(folder), "train", None, 0)
    try:
        (image,) = samples[1]["images"]
        assert image.mode == "RGB"
    except DataError as error:
        assert error.row == 2
        assert error.file.startswith(str(folder))


@pytest.mark.parametrize("percent", [5, 20, 50, 80, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_picture_is_named_or_whole_all_the_same(tmp_path, kind, percent):
    data = png(image=Image.effect_noise((64, 64), 80).convert("RGB"), kind=kind)
    write_picture(tmp_path, data[: len(data) * percent // 100], "path")
    is_a_sample_or_named(tmp_path)
    if percent <= 50:
        is_named_and_skipped(tmp_path, "cannot be|is none of")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_a_flipped_byte_never_gets_further_than_the_reader(tmp_path, kind, seed):
    rng = np.random.default_rng(seed)
    data = np.frombuffer(png(kind=kind), dtype=np.uint8).copy()
    places = rng.integers(0, min(len(data), 120), 6)  # where the headers are
    data[places] = rng.integers(0, 256, 6)
    write_picture(tmp_path, data.tobytes(), "bytes")
    is_a_sample_or_named(tmp_path)


# --- paths ---------------------------------------------------------------------------------------

PATHS: dict[str, tuple[object, str]] = {
    "up": ("../secret.png", "leads out of"),
    "up and down": ("images/../../secret.png", "leads out of"),
    "up, many": ("../" * 30 + "etc/passwd", "leads out of"),
    "absolute": ("/etc/passwd", "leads out of"),
    "a device": ("/dev/zero", "leads out of"),
    "in a struct": ({"bytes": None, "path": "../secret.png"}, "leads out of"),
    "in a list": (["../secret.png"], "leads out of"),
    "a link": ("link.png", "leads out of"),
    "a linked folder": ("linked/secret.png", "leads out of"),
    "a link to a link": ("link2.png", "leads out of"),
    "a link to itself": ("loop.png", "cannot be opened"),
    "a link to nothing": ("dangling.png", "leads out of|cannot be opened"),
    "a pipe": ("pipe.png", "is no file"),
    "a folder": ("images", "is no file"),
    "itself": (".", "is no file"),
    "not there": ("images/none.png", "cannot be opened in .*: No such file"),
    "home": ("~/.ssh/id_rsa", "cannot be opened in"),
    "backslashes": ("images\\..\\..\\secret.png", "cannot be opened in"),
    "a zero": ("images/0\0.png", "is no path|cannot be opened"),
    "long": ("a" * 5000, "cannot be opened"),
    "deep": ("a/" * 3000, "cannot be opened"),
    "file": ("file:///etc/passwd", "is a URL"),
    "http": ("http://localhost/x.png", "is a URL"),
    "https": ("https://example.com/x.png", "is a URL"),
    "ftp": ("ftp://example.com/x.png", "is a URL"),
    "bucket": ("s3://bucket/x.png", "is a URL"),
    "hub": ("hf://datasets/a/b/x.png", "is a URL"),
    "chained": ("zip://x.png::https://example.com/a.zip", "is a URL"),
    "data": ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
    "a URL in a struct": ({"bytes": None, "path": "https://example.com/x.png"}, "is a URL"),
    "expanded": ("$HOME/x.png", "cannot be opened"),
    "a pattern": ("images/*.png", "cannot be opened"),
    "a number": (5, "where a picture is expected"),
    "a truth": (True, "where a picture is expected"),
    "other keys": ({"url": "x.png"}, "where a picture is expected"),
    "nothing in a list": ([None], "where a picture is expected"),
    "a number in a list": (["images/0.png", 3], "where a picture is expected"),
    "an empty path": ([""], "is empty"),
    "ragged pixels": ([[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]], "ragged"),
    "flat pixels": ([1, 2, 3], "of shape"),
    "four channels of five": ([[[0] * 5] * 8] * 8, "of shape"),
    "too bright": ([[[300, 0, 0]] * 8] * 8, "whole numbers from 0 to 255"),
    "negative": ([[[-1, 0, 0]] * 8] * 8, "whole numbers from 0 to 255"),
    "NaN pixels": ([[[float("nan"), 0.0, 0.0]] * 8] * 8, "not all whole numbers"),
    "infinite pixels": ([[[float("inf"), 0.0, 0.0]] * 8] * 8, "not all whole numbers"),
    "words for pixels": ([[["a", "b", "c"]] * 8] * 8, "not all whole numbers"),
    "few pixels": ([[[0, 0, 0]]], "has 1 x 1 pixels"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_picture_from_elsewhere_is_refused(tmp_path, name):
    value, problem = PATHS[name]
    folder = tmp_path / "data"
    write_row(folder, image=value)
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link2.png").symlink_to("link.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(folder / "pipe.png")
    is_named_and_skipped(folder, problem)


@pytest.mark.parametrize(
    "value", ["absolute", "./images/0.png", "images/../images/0.png", "in.png"]
)
def test_a_picture_inside_is_found_however_it_is_written(tmp_path, value):
    write_row(tmp_path, image=str(tmp_path / "images/0.png") if value == "absolute" else value)
    (tmp_path / "in.png").symlink_to("images/0.png")
    assert read(str(tmp_path), "train", None, 0)[1]["images"][0].tobytes() == picture(0).tobytes()


def test_another_root_is_a_root_too(tmp_path):
    write_row(tmp_path / "rows", image="0.png")
    write_row(tmp_path / "pictures", image="x")
    samples = read(str(tmp_path / "rows"), "train", None, 0, image_root="../pictures/images")
    assert samples[1]["images"]
    with pytest.raises(DataError, match="cannot be opened in"):
        samples[0]  # its path counts from the rows' folder


# --- rows ----------------------------------------------------------------------------------------

LINES: dict[str, tuple[bytes, str]] = {
    "half a row": (b'{"question": "a", "answ', "is not JSON"),
    "words": (b"not json at all", "is not JSON"),
    "single quotes": (b"{'question': 'a', 'answer': 'b'}", "is not JSON"),
    "two rows": (b'{"question": "a", "answer": "b"} {"question": "a"}', "is not JSON: Extra data"),
    "a comma behind": (b'{"question": "a", "answer": "b",}', "is not JSON"),
    "a list": (b'["a", "b"]', "expected a row with names"),
    "a text": (b'"a"', "expected a row with names"),
    "a number": (b"7", "expected a row with names"),
    "null": (b"null", "expected a row with names"),
    "deep": (b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a huge number": (b'{"question": "a", "answer": ' + b"9" * 9999 + b"}", "can be read"),
    "bad UTF-8": (b'{"question": "a", "answer": "\xff\xfe"}', "the answer is not text in UTF-8"),
    "Latin-1": ('{"question": "Größe?", "answer": "b"}'.encode("latin-1"), "not text in UTF-8"),
    "half a character": (b'{"question": "a", "answer": "\\ud800"}', "is not text in UTF-8"),
    "a pickle": (PICKLE.replace(b"\n", b""), "is not JSON"),
    "zeros": (b"\0" * 50, "is not JSON"),
    "no columns": (b"{}", "has no 'answer'; it has nothing"),
}
ROWS: dict[str, tuple[dict, str]] = {
    "no question": ({"question": "MISSING"}, "has no 'question'; it has image, answer"),
    "no answer": ({"answer": "MISSING"}, "has no 'answer'; it has image, question"),
    "null question": ({"question": None}, "question is None, expected text"),
    "null answer": ({"answer": None}, "the answer is None, expected text"),
    "empty question": ({"question": ""}, "question is empty"),
    "empty answer": ({"answer": ""}, "the answer is empty"),
    "blank answer": ({"answer": " \n\t"}, "the answer is empty"),
    "NaN answer": ({"answer": float("nan")}, "the answer is nan, expected text"),
    "no answers": ({"answer": []}, "the list of answers is empty"),
    "an empty answer of two": ({"answer": ["a", ""]}, "an answer is empty"),
    "a struct": ({"answer": {"text": "red"}}, "expected text"),
    "a list of lists": ({"answer": [["red"]]}, "expected text"),
    "one marker too many": ({"question": "<image> <image>?"}, "refers to 2 pictures .* row has 1"),
    "a marker, no picture": ({"image": None, "question": "<image>?"}, "1 pictures .* row has 0"),
    "a marker too few": (
        {"image": ["images/0.png"] * 2, "question": "<image>?"},
        "refers to 1 pictures .* the row has 2",
    ),
}


def said(*turns: tuple[object, object]) -> list[dict]:
    return [{"from": role, "value": value} for role, value in turns]


TURNS: dict[str, tuple[object, str]] = {
    "none": ([], "where a list of turns is expected"),
    "null": (None, "where a list of turns is expected"),
    "text": ("Hello", "where a list of turns is expected"),
    "a struct": ({"from": "human"}, "where a list of turns is expected"),
    "turns of text": (["Hello", "Hi"], "turn 1 is 'Hello', expected a role"),
    "an unknown role": (said(("human", "a"), ("tool", "b")), "turn 2 has the role 'tool', not one"),
    "no role": (said((None, "a"), ("gpt", "b")), "turn 1 has the role None"),
    "a role that is a list": (said((["human"], "a"), ("gpt", "b")), "turn 1 has the role"),
    "the user last": (said(("gpt", "a"), ("human", "b")), "turns are assistant, user; expected"),
    "the assistant alone": (said(("gpt", "a")), "the turns are assistant; expected"),
    "the user alone": (said(("human", "a")), "the turns are user; expected"),
    "nothing asked": (said(("human", ""), ("gpt", "b")), "a turn is empty"),
    "nothing answered": (said(("human", "a"), ("gpt", " ")), "a turn is empty"),
    "null answered": (said(("human", "a"), ("gpt", None)), "a turn is empty"),
    "a marker too many": (said(("human", "<image>\na"), ("gpt", "b")), "refers to 1 .* has 0"),
    "a marker in the answer": (said(("human", "a"), ("gpt", "<image>")), "where no picture can be"),
    "a marker in the system": (
        said(("system", "<image>"), ("human", "a"), ("gpt", "b")),
        "where no picture can be",
    ),
    "a video": (said(("human", [{"type": "video"}]), ("gpt", "b")), "has the part .*video"),
    "parts of text": (said(("human", ["a"]), ("gpt", "b")), "has the part 'a', expected"),
    "a part without text": (
        said(("human", [{"type": "text"}]), ("gpt", "b")),
        "a text part is",
    ),
    "a picture part without picture": (
        said(("human", [{"type": "image"}]), ("gpt", "b")),
        "refers to 1 pictures .* the row has 0",
    ),
    "a URL inside": (
        said(
            ("human", [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]),
            ("gpt", "b"),
        ),
        "is a URL",
    ),
    "half a character": (said(("human", "\ud800"), ("gpt", "b")), "not text in UTF-8"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named(tmp_path, name):
    line, problem = LINES[name]
    write_lines(tmp_path, line)
    is_named_and_skipped(tmp_path, problem)


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    row, problem = ROWS[name]
    write_row(tmp_path, **row)
    is_named_and_skipped(tmp_path, problem)


@pytest.mark.parametrize("name", TURNS)
def test_bad_turns_are_named(tmp_path, name):
    turns, problem = TURNS[name]
    good = said(("human", "a"), ("gpt", "b"))
    write_jsonl(tmp_path / "train.jsonl", [{"conversations": each} for each in (good, turns, good)])
    is_named_and_skipped(tmp_path, problem)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["question,answer", "a,b", "a", "a,b"], "has 1 cells, its header 2"),
        (["question,answer", "a,b", "a,b,c", "a,b"], "has 3 cells, its header 2"),
        (["question,answer", "a,b", "a,", "a,b"], "the answer is empty"),
        (["question,answer,image", "a,b,", "a,b,../x.png", "a,b,"], "leads out of"),
    ],
)
def test_a_bad_line_of_a_table_is_named_by_its_line(tmp_path, lines, problem):
    (tmp_path / "train.csv").write_text("\n".join(lines))
    samples = read(str(tmp_path), "train", None, 0)
    with pytest.raises(DataError, match=problem) as caught:
        samples[1]
    assert caught.value.row == 3
    assert (samples[0]["id"], samples[2]["id"]) == ("train-2", "train-4")


# --- files ---------------------------------------------------------------------------------------

GOOD = b'{"question": "a", "answer": "b"}'
WHOLE: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("train.jsonl", b"", "holds no rows"),
    "blank lines": ("train.jsonl", b"\n \n\n", "holds no rows"),
    "an empty list": ("train.json", b"[]", "holds no rows"),
    "an object": ("train.json", b'{\n "data": []\n}', "is one JSON object, expected a list"),
    "half a list": ("train.json", b"[" + GOOD, r"is not JSON: .* \(line 1, column 34"),
    "a list and more": ("train.json", b"[" + GOOD + b"] x", "is not JSON: Extra data"),
    "UTF-16": ("train.json", "[]".encode("utf-16"), "is not JSON"),
    "deep lists": ("train.json", b"[" * 200_000, "nested too deeply"),
    "a pickle, JSON": ("train.json", PICKLE, "is not JSON"),
    "a pickle, lines": ("train.jsonl", PICKLE, "is not JSON"),
    "a pickle, Parquet": ("train.parquet", PICKLE, "is no Parquet that can be read"),
    "a pickle, table": ("train.csv", PICKLE, "holds no rows|is no table|none that is"),
    "zip, JSON": ("train.json", archive("zip"), "is not JSON"),
    "zip, Parquet": ("train.parquet", archive("zip"), "is no Parquet that can be read"),
    "nothing, Parquet": ("train.parquet", b"", "is no Parquet that can be read"),
    "a head, Parquet": ("train.parquet", b"PAR1" + bytes(99), "is no Parquet that can be read"),
    "nothing, table": ("train.csv", b"", "holds no rows"),
    "a header alone": ("train.csv", b"question,answer\n", "holds no rows"),
    "an open quote": ("train.csv", b'question,answer\n"a,b\n', "is no table that can be read"),
    "a huge cell": ("train.csv", b"question,answer\n" + b"a" * 200_000 + b",b", "is no table"),
    "rows of lists": ("train.json", b"[[1], [2]]", "expected a row with names"),
    "other columns": ("train.json", b'[{"a": 1}]', "found the columns a, and none that"),
    "a pickle": ("train.pkl", PICKLE, "has no file for the split 'train'"),
    "an array": ("train.npy", b"\x93NUMPY", "has no file for the split 'train'"),
    "a checkpoint": ("train.pt", PICKLE, "has no file for the split 'train'"),
    "zip": ("train.zip", archive("zip"), "has no file for the split 'train'"),
    "tar": ("train.tar.gz", archive("tar"), "has no file for the split 'train'"),
    "a script": ("train.py", b"open('executed', 'w')", "has no file for the split 'train'"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_none_is_named(tmp_path, monkeypatch, name):
    file, data, problem = WHOLE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_bytes(data)
    with pytest.raises(DataError, match=problem) as caught:
        read(str(tmp_path), "train", None, 0)
    assert caught.value.file.startswith(str(tmp_path))
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path.parent / "slipped.png").exists()


@pytest.mark.parametrize("ending", ["pkl", "npy", "npz", "pt", "zip", "tar.gz", "py", "txt", "h5"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, ending):
    file = tmp_path / f"all.{ending}"
    file.write_bytes(PICKLE)
    with pytest.raises(DataError, match="expected a file of rows .* unpack an archive first"):
        read(str(file), "train", None, 0)


@pytest.mark.parametrize("percent", [10, 50, 90, 99])
def test_a_cut_parquet_file_is_named(tmp_path, percent):
    file = write_parquet(tmp_path / "train.parquet", [{"question": "a", "answer": "b"}] * 50)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * percent // 100])
    with pytest.raises(DataError, match="is no Parquet that can be read"):
        read(str(tmp_path), "train", None, 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_parquet_file_is_named_or_read(tmp_path, seed):
    """Flipped bytes in pages and footer; what still decodes is text or a DataError."""
    rows = [{"question": f"{n}?", "answer": "b"} for n in range(50)]
    file = write_parquet(tmp_path / "train.parquet", rows)
    rng, data = np.random.default_rng(seed), bytearray(file.read_bytes())
    for place in rng.integers(4, len(data) - 8, 8):
        data[place] = int(rng.integers(0, 256))
    file.write_bytes(bytes(data))
    try:
        assert all(sample["messages"] for sample in read(str(tmp_path), "train", None, 0))
    except DataError as error:
        assert error.file == str(file)
