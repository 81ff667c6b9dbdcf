"""Pictures with the names of their classes: folders, tables, the hub, and what the package draws.

Which picture is of which class is known without opening one; a picture that cannot be read is met
when it is asked for.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mllm_cl.data import filled
from mllm_cl.data.errors import DataError, shortened
from mllm_cl.data.source import open_rows
from mllm_cl.data.source.folders import FolderRows, class_folder
from mllm_cl.data.source.labels import RowPictures, by_name, classes_of, labelled_format
from mllm_cl.data.source.reading import Reading
from mllm_cl.data.source.split import chosen
from mllm_cl.task import Sample

OWN = ("label", "number", "classes")
NO_USE = ("question", "answer", "prompt", "streaming")  # of what a Reading takes


class Pictures(Protocol):
    """Where the samples of a set come from: by index, without their labels."""

    def id(self, index: int) -> str: ...
    def place(self, index: int) -> tuple[str, int | None]: ...
    def sample(self, index: int) -> dict[str, object]: ...


class Chosen(Sequence):
    """Samples of `pictures`, those at `indices`; each is a `sample` with what is said of it."""

    pictures: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, none at {index}")
        return self.sample(index)

    def sample(self, index: int) -> Sample:
        """The sample at a place that there is."""
        raise NotImplementedError

    def id(self, index: int) -> str:
        """The id of a sample, without its picture: unique in all splits of the data."""
        return self.pictures.id(self.indices[index])

    def place(self, index: int) -> tuple[str, int | None]:
        """File and row of a sample; no row where the picture is a file of its own."""
        return self.pictures.place(self.indices[index])


@dataclass(frozen=True, eq=False)
class Labelled(Chosen):
    """Samples `{"id", "images", "label"}`, where "label" is the name of a class; some "caption".

    `names` are the classes in the data's own order, `targets` each sample's place among them. Of
    `pictures` those at `indices` belong to the set. A sample that cannot be read is a DataError
    naming its file and row.
    """

    pictures: Pictures
    names: tuple[str, ...]
    targets: tuple[int, ...]
    indices: Sequence[int]

    def sample(self, index: int) -> Sample:
        """The sample at a place that there is."""
        sample = self.pictures.sample(self.indices[index])
        return sample | {"label": self.names[self.targets[index]]}

    def select(self, places: Iterable[int]) -> "Labelled":
        """Some of the samples, in the order of `places`; the names stay what they are."""
        places = list(places)
        targets = tuple(self.targets[place] for place in places)
        indices = [self.indices[place] for place in places]
        return Labelled(self.pictures, self.names, targets, indices)

    def joined(self, *others: "Labelled") -> "Labelled":
        """These samples and then the others', of the same data."""
        every = (self, *others)
        assert all(one.pictures is self.pictures and one.names == self.names for one in every)
        targets = tuple(target for one in every for target in one.targets)
        return Labelled(
            self.pictures, self.names, targets, [place for one in every for place in one.indices]
        )

    def of(self, classes: Iterable[str]) -> "Labelled":
        """The samples of some classes, in their order; the names stay what they are."""
        wanted = {_number(name, self.names) for name in classes}
        return self.select(place for place, one in enumerate(self.targets) if one in wanted)


def labelled(
    data: str, split: str, size: int | None = None, seed: int = 0, **args: object
) -> Labelled:
    """The pictures of `data` with their classes, at most `size` of each class (None: all).

    `data` is `toy:NAME` (`seed` draws its pictures), a folder with `train/CLASS/*.jpg`, or rows in
    a file, a folder or a data set of the hub, read as `mllm_cl.data.source.reading` says. `label`
    names their column of classes. `classes` takes those it names, in its order, `number` the first
    so many, of those or by name. Classes that the data do not list come in the order of their
    names. Raises DataError for what cannot be read, and where a class has nothing to train on.
    """
    own = {key: args[key] for key in OWN if args.get(key) is not None}
    rest = {key: value for key, value in args.items() if key not in OWN}
    _check(own, rest)
    if data.startswith("toy:"):
        found = _toy(data.removeprefix("toy:"), split, size, seed, [*own, *rest])
    else:
        found = _of_rows(filled(data), split, own.get("label"), Reading.of(rest))
    if "number" in own or "classes" in own:
        found = _narrowed(found, own.get("number"), own.get("classes"), data)
    if split == "train":
        _refuse_empty(found, data)
    return found if size is None else found.select(_first_of_each(found.targets, size))


def _toy(name: str, split: str, size: int | None, seed: int, args: list[str]) -> Labelled:
    from mllm_cl.data.toy_classes import toy_classes

    unused = [key for key in args if key not in ("number", "classes")]
    if unused:
        raise DataError(f"takes the args 'number' and 'classes', not {unused[0]!r}", f"toy:{name}")
    drawn = toy_classes(name, split, size, seed)
    return Labelled(drawn, drawn.names, drawn.targets, range(len(drawn.targets)))


def _of_rows(data: str, split: str, label: str | None, reading: Reading) -> Labelled:
    folder = class_folder(data, split, reading)
    if folder is None:
        rows, root, file = open_rows(data, split, reading)
    else:
        rows, root, file = FolderRows(folder), folder, str(folder)
    form = labelled_format(rows, label, reading.image, file)
    values, names = classes_of(rows, form.answer)
    indices = list(chosen(rows, split, form, root, reading))
    if not indices:
        raise DataError(f"no row is left for the split {split!r}", file)
    number = {name: place for place, name in enumerate(names)}
    targets = tuple(number[values[index]] for index in indices)
    return Labelled(RowPictures(rows, form, root, split), names, targets, indices)


def _narrowed(
    found: Labelled, number: int | None, classes: Sequence[str] | None, data: str
) -> Labelled:
    """The set with some of its classes as all there are."""
    there = len(found.names if classes is None else classes)
    if number is not None and number > there:
        raise DataError(f"number is {number}, but there are {there} classes", data)
    if classes is not None:
        names = list(classes[:number])
    else:
        first = set(sorted(found.names, key=by_name(found.names))[:number])
        names = [name for name in found.names if name in first]
    places = {_number(name, found.names, data): place for place, name in enumerate(names)}
    kept = found.of(names)
    targets = tuple(places[target] for target in kept.targets)
    return Labelled(kept.pictures, tuple(names), targets, kept.indices)


def _number(name: str, names: Sequence[str], data: str = "") -> int:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {shortened(list(names))}"
        raise DataError(f"there is no class {name!r}; {hint}", data)
    return names.index(name)


def _first_of_each(targets: Sequence[int], size: int) -> list[int]:
    seen: Counter[int] = Counter()
    places = []
    for place, target in enumerate(targets):
        seen[target] += 1
        places += [place] if seen[target] <= size else []
    return places


def _refuse_empty(found: Labelled, data: str) -> None:
    there = set(found.targets)
    empty = [name for number, name in enumerate(found.names) if number not in there]
    if empty:
        problem = f"{len(empty)} of {len(found.names)} classes have no picture to train on"
        hint = "name the others by args: {classes: [...]}"
        raise DataError(f"{problem}, such as {empty[0]!r}; {hint}", data)


def _check(own: Mapping[str, object], rest: Mapping[str, object]) -> None:
    for key in NO_USE:
        if key in rest:
            raise DataError(f"args has {key!r}, which pictures with classes have no use for")
    label, number, classes = own.get("label"), own.get("number"), own.get("classes")
    if label is not None and not isinstance(label, str):
        raise DataError(f"args.label is {shortened(label)}, expected the name of a column")
    if number is not None and (type(number) is not int or number < 1):
        raise DataError(f"args.number is {shortened(number)}, expected a number of classes")
    if classes is None:
        return
    listed = isinstance(classes, list | tuple) and all(isinstance(one, str) for one in classes)
    if not listed or not classes or len(set(classes)) < len(classes):
        found = shortened(classes)
        raise DataError(f"args.classes is {found}, expected a list of different names")
