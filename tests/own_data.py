"""Writes small data sets of the kinds that people bring, for the tests of data."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "purple")
QUESTION = "Which colour is this?"


def picture(number: int, side: int = 32) -> Image.Image:
    """A picture of one colour with a mark of its own, so that no two are the same."""
    image = Image.new("RGB", (side, side), COLOURS[number % len(COLOURS)])
    image.putpixel((number % side, number // side % side), (255, 255, 255))
    return image


def png(number: int = 0, image: Image.Image | None = None, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    (image or picture(number)).save(buffer, kind, **options)
    return buffer.getvalue()


def answer(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def write_pictures(folder: Path, numbers: Sequence[int]) -> list[str]:
    """Picture files under `folder`/images; their paths as rows name them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number}.png" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        (folder / name).write_bytes(png(number))
    return names


def question_rows(folder: Path, numbers: Sequence[int]) -> list[dict]:
    """Rows of image, question and answer, with their pictures in files."""
    names = write_pictures(folder, numbers)
    return [
        {"id": f"own-{number}", "image": name, "question": QUESTION, "answer": answer(number)}
        for number, name in zip(numbers, names, strict=True)
    ]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    columns = dict.fromkeys(name for row in rows for name in row)
    filled = [{name: row.get(name) for name in columns} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(filled), path)
    return path


def write_example(folder: Path, num_train: int = 10, num_test: int = 5) -> Path:
    """A data set of ten questions about pictures, in a training and a test file."""
    rows = question_rows(folder, range(num_train + num_test))
    write_jsonl(folder / "train.jsonl", rows[:num_train])
    write_jsonl(folder / "test.jsonl", rows[num_train:])
    return folder
