"""Folders of pictures with one folder for each class: `train/CLASS/*.jpg`."""

import os
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.arrow import Row
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.rows import SUFFIXES

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
PICTURES += (".jp2", ".avif")


class FolderRows:
    """The pictures below a folder as rows: the class is the first folder, the path counts from it.

    In the order of their names; files that are no pictures by their names, and what begins with a
    dot, are none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = tuple(sorted(each.name for each in _folders(folder)))
        self.paths = [path for name in self.names for path in _pictures(folder, name)]
        if not self.paths:
            raise DataError("has folders, but no picture in them", str(folder))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Row:
        path = self.paths[index]
        return {"image": path, "label": path.partition(os.sep)[0]}

    def place(self, index: int) -> tuple[str, None]:
        return str(self.folder / self.paths[index]), None


def class_folder(data: str, split: str, reading: Reading) -> Path | None:
    """The folder of a split, or all of it under a `test_share`, if it has one for each class."""
    path, side = Path(data).expanduser(), reading.side(split)
    own = path / (vars(reading)[side] or side)
    if reading.test_share is not None and not own.is_dir():
        own = path
    if not own.is_dir() or not _folders(own):
        return None
    rows = any(each.suffix.lower() in SUFFIXES for each in own.iterdir())
    saved = (own / "state.json").exists() or (own / "dataset_dict.json").exists()
    return None if rows or saved else own


def _folders(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.is_dir() and each.name[0] != "."]


def _pictures(folder: Path, name: str) -> list[str]:
    """The paths of a class's pictures, from the folder of all classes."""
    below = (folder / name).rglob("*")
    found = (str(path.relative_to(folder)) for path in below if path.name[0] != ".")
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in PICTURES)
