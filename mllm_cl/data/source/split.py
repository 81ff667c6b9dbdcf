"""Which rows belong to a split: the first so many of a file, or of one side of it."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from mllm_cl.data.errors import DataError
from mllm_cl.data.source.arrow import Row
from mllm_cl.data.source.formats import Format, detect
from mllm_cl.data.source.images import picture_key
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.rows import Rows
from mllm_cl.data.source.samples import Samples, question

PEEKED = 100  # rows whose columns are looked at
FEW = 1000  # rows of which chance may put none into a test share
DRAWN, TOO_FEW = 256, 16  # rows whose answers are compared, and too few to compare. ours


def choose(
    rows: Rows, split: str, size: int | None, reading: Reading, root: Path, file: str
) -> Samples:
    """The first `size` samples of a split (None: all) among `rows`; DataError if there are none."""
    form = format_of(columns_of(rows), reading, file)
    indices = list(islice(chosen(rows, split, form, root, reading), size))
    if not indices:
        raise DataError(f"no row is left for the split {split!r}", file)
    return Samples(rows, form, root, indices)


def chosen(rows: Rows, split: str, form: Format, root: Path, reading: Reading) -> Iterable[int]:
    """The rows of a split in their order."""
    if reading.test_share is None:
        return range(len(rows))
    share = reading.test_share
    places = (draw(_row(rows, index), form, root, reading) for index in range(len(rows)))
    if len(rows) < FEW:  # chance may leave nothing to test: then the first in line is taken
        places = list(places)
        share = max(share, min(places) + 1e-9)
    return (index for index, place in enumerate(places) if (place < share) == (split == "test"))


def format_of(columns: Iterable[str], reading: Reading, file: str) -> Format:
    """The format of rows with these columns, as far as `reading` leaves it open."""
    given = {key: vars(reading)[key] for key in ("image", "question", "answer", "prompt")}
    return detect(columns, given, file)


def draw(row: Row | None, form: Format, root: Path, reading: Reading) -> float:
    """A number from 0 to 1, the same for rows of the same pictures (without any, question).

    A row belongs to the test share if it is below. Rows that cannot be read are trained on: that
    they cannot is met, and named, there.
    """
    try:
        messages, images, _ = form.read(row or {})
        key = [picture_key(image, root) for image in images] or [question(messages)]
    except DataError:
        return 1.0
    digest = hashlib.sha256(repr((reading.split_seed, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def one_sided(samples: Samples) -> str:
    """What to say of a part of a file that has at most half as many different answers as rows from
    all over the file, as the first rows of one that is ordered by class; else empty.

    Looked at are a few hundred rows, without their pictures.
    """
    rows, part = samples.rows, samples.indices
    number = min(len(part), DRAWN)
    if len(part) == len(rows) or number < TOO_FEW:
        return ""
    chance = random.Random(0)
    places = chance.sample(part, number), chance.sample(range(len(rows)), number)
    found, whole = (len(_answers(samples, each)) for each in places)
    if 2 * found > whole:
        return ""
    return (
        f"{found} different answers in {number} of the {len(part)} rows that are used, {whole} in "
        f"as many of all {len(rows)}: it seems to be ordered by answer, and a size takes the first "
        "rows. Shuffle the file, or leave the size out"
    )


def _answers(samples: Samples, places: Sequence[int]) -> set[str]:
    """The different answers of some rows; one that cannot be read has none."""
    found = set()
    for place in places:
        try:
            messages, _, _ = samples.format.read(samples.rows[place])
        except DataError:
            continue
        found.add("".join(part["text"] for part in messages[-1]["content"]))
    return found


def _row(rows: Rows, index: int) -> Row | None:
    try:
        return rows[index]
    except DataError:
        return None


def columns_of(rows: Rows) -> list[str]:
    """The columns of the first rows that can be read; DataError if none can."""
    columns: dict[str, None] = {}
    problem = None
    for index in range(min(PEEKED, len(rows))):
        try:
            columns |= dict.fromkeys(rows[index])
        except DataError as error:
            problem = problem or error.at(*rows.place(index))
    if not columns and problem is not None:
        raise problem
    return list(columns)
