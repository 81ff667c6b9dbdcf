"""Data sets of the hub, streamed ones, and what `Dataset.save_to_disk` wrote."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.arrow import ArrowRows, Row, load, named_classes
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.rows import ListedRows
from mllm_cl.data.source.samples import Samples
from mllm_cl.data.source.split import choose, draw, format_of


def hub_samples(data: str, split: str, size: int | None, reading: Reading) -> Samples:
    """The first `size` samples of a split of a data set on the hub, or in its cache."""
    loaded, root, file = _loaded(data, split, reading)
    if reading.streaming:
        return streamed_samples(loaded, split, size, reading, root, file)
    return choose(ArrowRows(loaded, file), split, size, reading, root, file)


def hub_rows(data: str, split: str, reading: Reading) -> tuple[ArrowRows, Path, str]:
    """What `mllm_cl.data.source.open_rows` returns, from the hub or its cache."""
    loaded, root, file = _loaded(data, split, reading)
    return ArrowRows(loaded, file), root, file


def saved_rows(path: Path) -> ArrowRows:
    """The rows of what `save_to_disk` wrote."""
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot be read as a saved data set: {error}", str(path)) from error
    return ArrowRows(saved, str(path))


def _loaded(data: str, split: str, reading: Reading) -> tuple[object, Path, str]:
    """The data set or the stream of a split's side, its pictures' folder and its name."""
    import datasets

    side = vars(reading)[reading.side(split)] or reading.side(split)
    options = {"name": reading.name, "revision": reading.revision, "streaming": reading.streaming}
    try:
        loaded = load(data, split=side, **options)
    except DataError as error:
        problem = f"is no file or folder here, and from the hub it {error.problem}"
        raise DataError(problem, data) from error.__cause__
    # What the hub's own files refer to lies in its cache; pictures are opened from nowhere else.
    root = Path(reading.image_root or datasets.config.HF_CACHE_HOME)
    return loaded, root, f"{data}, {side}"


def streamed_samples(
    stream, split: str, size: int | None, reading: Reading, root: Path, file: str
) -> Samples:
    """The first `size` rows of a stream's split, held in memory as any other data set is."""
    from datasets import ClassLabel

    if size is None:
        raise DataError("is streamed, which needs a number of rows: train_size, eval_size", file)
    features = (stream.features or {}).items()
    names = {key: each.names for key, each in features if isinstance(each, ClassLabel)}
    kept: list[Row] = []
    numbers: list[int] = []
    for number, row in _streamed(stream.decode(False), file):
        row, share = named_classes(row, names), reading.test_share
        place = 0.0 if share is None else draw(row, format_of(row, reading, file), root, reading)
        if share is None or (place < share) == (split == "test"):
            kept.append(row)
            numbers.append(number)
        if len(kept) == size:
            break
    rows = ListedRows(file, kept, numbers)
    return choose(rows, split, size, replace(reading, test_share=None), root, file)


def _streamed(stream, file: str) -> Iterator[tuple[int, Row]]:
    import datasets
    import pyarrow

    errors = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError)
    try:
        yield from enumerate(stream, start=1)
    except errors as error:
        raise DataError(f"cannot be streamed: {error}", file) from error
