"""From the `data` and `args` of a task to samples: files, folders, and data sets of the hub.

A folder has a file (or several) for each split, with `train` or `test` in its name. A file holds
what is trained on; the test set is another file, or a share of the rows that is not trained on.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.rows import SUFFIXES, JoinedRows, Rows, read_rows
from mllm_cl.data.source.samples import Samples
from mllm_cl.data.source.split import choose


def open_samples(data: str, split: str, size: int | None, reading: Reading) -> Samples:
    """The first `size` samples of a split (None: all); DataError where there is no such thing."""
    if reading.streaming and _saved(data, split, reading) is None:
        return _streamed(data, split, size, reading)
    rows, root, file = open_rows(data, split, reading)
    return choose(rows, split, size, reading, root, file)


def open_rows(data: str, split: str, reading: Reading) -> tuple[Rows, Path, str]:
    """All rows of the file that a split is in, the folder of their pictures, and the file's name.

    With a `test_share` the rows of both splits are in it.
    """
    from mllm_cl.data.source.hub import hub_rows, saved_rows

    saved = _saved(data, split, reading)
    if saved is not None:
        return saved_rows(saved), _root(reading, saved), str(saved)
    files = _files(data, split, reading)
    if not files:
        return hub_rows(data, split, reading)
    parts = [read_rows(file) for file in files]
    rows = parts[0] if len(parts) == 1 else JoinedRows(parts)
    return rows, _pictures(data, files, reading), str(files[0])


def _streamed(data: str, split: str, size: int | None, reading: Reading) -> Samples:
    from mllm_cl.data.source.arrow import load
    from mllm_cl.data.source.hub import hub_samples, streamed_samples

    files = _files(data, split, reading)
    if not files:
        return hub_samples(data, split, size, reading)
    if any(file.suffix.lower() != ".parquet" for file in files):
        raise DataError("cannot be streamed: only Parquet and the hub can", str(files[0]))
    names = [str(file) for file in files]
    stream = load("parquet", data_files=names, split="train", streaming=True)
    root = _pictures(data, files, reading)
    return streamed_samples(stream, split, size, reading, root, names[0])


def _saved(data: str, split: str, reading: Reading) -> Path | None:
    """The folder of a split that `save_to_disk` wrote, if it is one."""
    path = Path(data).expanduser()
    if (path / "dataset_dict.json").exists():
        path = path / (vars(reading)[reading.side(split)] or reading.side(split))
    return path if (path / "state.json").exists() else None


def _files(data: str, split: str, reading: Reading) -> list[Path]:
    """The files of a split; none where `data` is the name of a data set on the hub."""
    path = Path(data).expanduser()
    if path.is_file():
        return [path] if reading.side(split) == "train" else [_test_file(path, reading)]
    if path.is_dir():
        return _split_files(path, reading.side(split), reading)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
        raise DataError("no such file or folder", data)
    return []


def _pictures(data: str, files: Sequence[Path], reading: Reading) -> Path:
    """The folder from which the paths of pictures in these files count."""
    if reading.image_root is None:
        return files[0].parent
    path = Path(data).expanduser()
    return _root(reading, path if path.is_dir() else path.parent)


def _root(reading: Reading, folder: Path) -> Path:
    if reading.image_root is None:
        return folder
    return _found(reading.image_root, folder, Path.is_dir)


def _test_file(path: Path, reading: Reading) -> Path:
    if reading.test is None:
        raise DataError(
            "is one file and says nothing of a test set; write args: {test: OTHER_FILE}, or "
            "args: {test_share: 0.1} to keep a tenth of its rows for testing",
            str(path),
        )
    test = _found(reading.test, path.parent, Path.is_file)
    if test.resolve() == path.resolve():
        raise DataError("is trained on and tested on; the test set has to be another", str(path))
    return test


def _split_files(folder: Path, side: str, reading: Reading) -> list[Path]:
    """The files of a split in a folder, its `data` or its folder of that name."""
    if vars(reading)[side] is not None:
        return [_found(vars(reading)[side], folder, Path.is_file)]
    places = [each for each in (folder, folder / "data", folder / side) if each.is_dir()]
    files = sorted(file for each in places for file in each.iterdir() if file.is_file())
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    own = [file for file in files if side in _words(file) or file.parent == folder / side]
    if len({file.suffix for file in own}) == 1:
        return own
    found = ", ".join(str(file.relative_to(folder)) for file in own or files) or "none"
    problem = "files of several kinds" if own else "no file"
    raise DataError(
        f"has {problem} for the split {side!r}, whose name would have {side!r} in it. Found are: "
        f"{found}. Name one by args: {{{side}: FILE}}, or keep a part of one set for testing by "
        "args: {test_share: 0.2}",
        str(folder),
    )


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z]+", file.stem.lower())


def _found(text: str, folder: Path, is_there: Callable[[Path], bool]) -> Path:
    """A path that counts from the data's folder or from the working directory."""
    for path in (folder / Path(text).expanduser(), Path(text).expanduser()):
        if is_there(path):
            return path
    raise DataError(f"found {text!r} neither in {folder} nor in {Path.cwd()}", str(folder))
