"""`mllm-cl data check RECIPE` where classes come in stages: every picture is opened once, before a
weight is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.text import Text

from mllm_cl.data.captioned import Captioned
from mllm_cl.data.check import verdict
from mllm_cl.data.classes import stage_names, stages
from mllm_cl.data.errors import DataError, some
from mllm_cl.data.labelled import Labelled, labelled
from mllm_cl.data.survey import picture_hash

LISTED = 20  # of what is named one by one


@dataclass
class Opened:
    """A set of pictures after all were opened; `bad` are those that could not be.

    `hashes` are those of the pixels of the others, by place.
    """

    samples: Labelled | Captioned
    bad: list[DataError] = field(default_factory=list)
    hashes: dict[int, str] = field(default_factory=dict)
    sizes: Counter = field(default_factory=Counter)

    @property
    def ids(self) -> list[str]:
        return [self.samples.id(place) for place in range(len(self.samples))]

    @property
    def counts(self) -> Counter:
        """How many pictures each class has, by name."""
        return Counter(self.samples.names[target] for target in self.samples.targets)


def check_classes(recipe, file: TextIO | None = None) -> int:
    """Print what is in the pictures of a recipe; 0 if a run would start and end on them, else 2."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    block, problems = recipe.classes, []
    console.print(f"\n{block.data}", style="bold", markup=False)
    try:
        sets = _sets(block)
    except ValueError as error:
        problems.append(str(error))
    else:
        opened = {split: open_all(samples) for split, samples in sets.items()}
        chosen = stages(sets["train"].names, block.first, block.increment, block.order)
        named = zip(stage_names(block.sizes()), chosen, strict=True)
        plan = list(named)[: block.stages]
        for words in _about(opened, plan):
            console.print(words if isinstance(words, Text) else Text(words))
        problems += _in_the_way(opened, plan)
        problems += _not_fit(recipe, sets["train"].names, plan)
    return verdict(console, problems)


def _sets(block) -> dict[str, Labelled]:
    """The two sides, as a run reads them."""
    train = labelled(block.data, "train", block.train_size, number=block.number, **block.args)
    wanted = block.args | {"classes": list(train.names)}
    return {"train": train, "test": labelled(block.data, "test", block.eval_size, **wanted)}


def open_all(samples: Labelled | Captioned) -> Opened:
    """Every picture of a set, opened once."""
    found = Opened(samples)
    for place in range(len(samples)):
        try:
            (image,) = samples[place]["images"]
        except DataError as error:
            found.bad.append(error)
            continue
        found.hashes[place] = picture_hash(image)
        found.sizes[image.size] += 1
    return found


def _about(
    opened: dict[str, Opened], plan: Sequence[tuple[str, tuple[str, ...]]]
) -> Iterator[str | Text]:
    for split, one in opened.items():
        yield f"  {split:8} {_counts(one)}"
        yield f"  {'':8} {sizes_of(one)}"
    train, test = (one.counts for one in opened.values())
    for name, classes in plan:
        numbers = f"{sum(train[c] for c in classes)} train, {sum(test[c] for c in classes)} test"
        yield f"  stage {name}: {numbers}; {len(classes)} classes: {some(classes, 6)}"
    yield from (Text(f"  {words}", style="yellow") for words in _odd(opened))
    yield from unreadable(opened)


def unreadable(opened: dict[str, Opened]) -> Iterator[Text]:
    """What cannot be opened, one by one."""
    for split, one in opened.items():
        for error in one.bad[:LISTED]:
            yield Text(f"  {split}: {error}", style="red")
        if len(one.bad) > LISTED:
            yield Text(f"  {split}: and {len(one.bad) - LISTED} more", style="red")


def _counts(one: Opened) -> str:
    number = [one.counts[name] for name in one.samples.names]
    each = f"{min(number)}" if min(number) == max(number) else f"{min(number)} to {max(number)}"
    total = f"{len(one.samples)} pictures of {len(number)} classes, {each} of each"
    return f"{total}, {len(one.bad)} that cannot be read"


def sizes_of(one: Opened) -> str:
    """How large the pictures are, in words."""
    if not one.sizes:
        return "no picture to measure"
    (width, height), most = one.sizes.most_common(1)[0]
    low, high = min(map(min, one.sizes)), max(map(max, one.sizes))
    share = most / sum(one.sizes.values())
    return f"sides of {low} to {high} pixels, {share:.0%} are {width} x {height}"


def _odd(opened: dict[str, Opened]) -> Iterator[str]:
    """What makes scores mean less, though a run would go on."""
    train, test = opened["train"], opened["test"]
    empty = [name for name in test.samples.names if not test.counts[name]]
    if empty:
        yield f"{len(empty)} classes have no picture to test with: {some(empty)}"
    shared = sorted(set(train.ids) & set(test.ids))
    if shared:
        yield f"{len(shared)} ids are in train and in test: {some(shared)}"
    known = set(train.hashes.values())
    shown = [test.samples.id(place) for place, one in test.hashes.items() if one in known]
    if shown:
        yield f"{len(shown)} of {len(test.hashes)} test pictures are in train: {some(shown)}"
    for split, one in opened.items():
        twice = [name for name, number in Counter(one.ids).items() if number > 1]
        if twice:
            yield f"{len(twice)} ids are those of several pictures of {split}: {some(twice)}"
        torn = _of_two_classes(one)
        if torn:
            yield f"{len(torn)} pictures of {split} are in two classes: {some(torn)}"


def _of_two_classes(one: Opened) -> list[str]:
    """The ids of pictures that an earlier one of another class equals."""
    first: dict[str, int] = {}
    targets = one.samples.targets
    return [
        one.samples.id(place)
        for place, pixels in one.hashes.items()
        if first.setdefault(pixels, targets[place]) != targets[place]
    ]


def _in_the_way(
    opened: dict[str, Opened], plan: Sequence[tuple[str, tuple[str, ...]]]
) -> Iterator[str]:
    """Why a run would not start, or not end."""
    for split, one in opened.items():
        if one.bad:
            yield f"{len(one.bad)} pictures of {split} cannot be read; mend or remove them"
    for name, classes in plan:
        if not any(opened["test"].counts[each] for each in classes):
            yield f"stage {name} has no picture to test with"


def _not_fit(
    recipe, names: Sequence[str], plan: Sequence[tuple[str, tuple[str, ...]]]
) -> Iterator[str]:
    """What else prompts, the method and the scores need of classes and do not get."""
    from mllm_cl.recipe.descriptions import check_descriptions
    from mllm_cl.recipe.texts import check_texts
    from mllm_cl.settings.class_incremental import check_company, check_scored

    chosen = [classes for _, classes in plan]
    planned = [name for classes in chosen for name in classes]
    checks = (
        lambda: check_texts(recipe, names),
        lambda: check_descriptions(recipe.classes, planned, recipe.method.describes),
        lambda: check_scored(recipe.classes),
        lambda: check_company(recipe, chosen),
    )
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)
