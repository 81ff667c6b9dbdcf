"""Pictures with captions, several each, in tasks by what the captions say.

What is said of a picture is known without opening it; one that cannot be read is met when it is
asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mllm_cl.data import filled
from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.labelled import NO_USE, Chosen, Pictures
from mllm_cl.data.source import open_rows
from mllm_cl.data.source.formats import Format
from mllm_cl.data.source.labels import RowPictures, check_image
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.rows import Rows, column
from mllm_cl.data.source.split import chosen, columns_of
from mllm_cl.data.words import assigned, forms
from mllm_cl.task import Sample

# Names of columns, in the order in which they are taken.
CAPTIONS = ("captions", "caption", "sentences", "texts", "text")
OWN = ("captions", "split_column")


@dataclass(frozen=True, eq=False)
class Captioned(Chosen):
    """Samples `{"id", "images", "captions"}` with one caption or more each.

    Of `pictures` those at `indices` belong to the set, and `captions` are theirs. A sample that
    cannot be read is a DataError naming its file and row.
    """

    pictures: Pictures
    captions: tuple[tuple[str, ...], ...]
    indices: Sequence[int]

    def sample(self, index: int) -> Sample:
        """The sample at a place that there is."""
        sample = self.pictures.sample(self.indices[index])
        return sample | {"captions": list(self.captions[index])}

    def select(self, places: Iterable[int]) -> "Captioned":
        """Some of the samples, in the order of `places`."""
        places = list(places)
        captions = tuple(self.captions[place] for place in places)
        return Captioned(self.pictures, captions, [self.indices[place] for place in places])


@dataclass(frozen=True)
class Cut:
    """A set in tasks: its samples by the word of their task, and how many have none."""

    tasks: Mapping[str, Captioned]
    dropped: int


def cut(
    samples: Captioned,
    words: Sequence[str],
    *,
    given: Mapping[str, Sequence[str]],
    assign: str = "first",
    size: int | None = None,
) -> Cut:
    """Each sample in the task of one word or in none; at most the first `size` of each task.

    `given` are forms of words in the place of those that rules make.
    """
    known = {word: frozenset(map(str.casefold, given.get(word) or forms(word))) for word in words}
    places: dict[str, list[int]] = {word: [] for word in words}
    for place, captions in enumerate(samples.captions):
        word = assigned(captions, known, assign)
        if word is not None:
            places[word].append(place)
    dropped = len(samples) - sum(map(len, places.values()))
    return Cut({word: samples.select(own[:size]) for word, own in places.items()}, dropped)


def captioned(data: str, split: str, **args: object) -> Captioned:
    """The pictures of a split of `data` with their captions.

    `data` is `toy:NAME`, or rows in a file, a folder or a data set of the hub, read as
    `mllm_cl.data.source.reading` says. `captions` names their column of captions, each a text or a
    list of texts. Where rows of both splits are together, a column `split`, or that which
    `split_column` names, says "train" or "test" of each; rows of any other split are left out.
    Raises DataError for what cannot be read.
    """
    own = {key: args[key] for key in OWN if args.get(key) is not None}
    rest = {key: value for key, value in args.items() if key not in OWN}
    if data.startswith("toy:"):
        return _toy(data.removeprefix("toy:"), split, [*own, *rest])
    _check(own, rest)
    data, reading = filled(data), Reading.of(rest)
    rows, root, file = open_rows(data, "train", reading)
    marks = _marks(rows, own.get("split_column"), reading, file)
    if marks is None and split != "train":
        rows, root, file = open_rows(data, split, reading)
    columns = tuple(columns_of(rows))
    answer = _column(columns, own.get("captions"), file)
    form = Format("captions", columns, prompt="?", answer=answer, image=reading.image)
    check_image(form, file)
    if marks is None:
        indices = list(chosen(rows, split, form, root, reading))
    else:
        indices = [index for index, mark in enumerate(marks) if mark == split]
    if not indices:
        raise DataError(f"no row is left for the split {split!r}", file)
    said = list(column(rows, answer))
    captions = tuple(_captions(said[index], rows.place(index)) for index in indices)
    return Captioned(RowPictures(rows, form, root, split), captions, indices)


def _toy(name: str, split: str, args: Sequence[str]) -> Captioned:
    from mllm_cl.data.toy_classes import toy_captions

    if args:
        raise DataError(f"takes no args, found {args[0]!r}", f"toy:{name}")
    drawn = toy_captions(name, split)
    return Captioned(drawn, drawn.captions, range(len(drawn.captions)))


def _marks(rows: Rows, given: str | None, reading: Reading, file: str) -> list[object] | None:
    """The split of every row, None where rows of both are not together."""
    if reading.test is not None and reading.test != reading.train or reading.test_share is not None:
        return None
    columns, name = columns_of(rows), given or "split"
    found = list(column(rows, name)) if name in columns else []
    if {"train", "test"} <= set(map(str, found)):
        return found
    if given is not None:
        known = ", ".join(sorted(set(map(str, found)))[:5]) or "no such column"
        problem = f"args.split_column is {given!r}, which has to say 'train' and 'test'"
        raise DataError(f"{problem}; found {known}", file)
    return None


def _column(columns: Sequence[str], given: str | None, file: str) -> str:
    found = f"found the columns {', '.join(columns)}"
    if given is not None and given not in columns:
        raise DataError(f"args.captions names {given!r}; {found}", file)
    name = given or next((name for name in CAPTIONS if name in columns), None)
    if name is None:
        hint = "write args: {captions: COLUMN}"
        raise DataError(f"{found}, and none that has the captions by its name; {hint}", file)
    return name


def _captions(value: object, where: tuple[str, int | None]) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    texts = isinstance(found, list) and all(isinstance(one, str) and one.strip() for one in found)
    if not texts or not found:
        problem = f"the captions are {shortened(value)}, expected a text or a list of texts"
        raise DataError(problem, *where)
    return tuple(found)


def _check(own: Mapping[str, object], rest: Mapping[str, object]) -> None:
    for key in NO_USE:
        if key in rest:
            raise DataError(f"args has {key!r}, which pictures with captions have no use for")
    for key, value in own.items():
        if not isinstance(value, str):
            raise DataError(f"args.{key} is {shortened(value)}, expected the name of a column")
