"""`mllm-cl data check RECIPE` for images with captions: every picture is opened once, before any
weight is loaded.
"""

from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text

from mllm_cl.data.captioned import Captioned
from mllm_cl.data.check import verdict
from mllm_cl.data.check_classes import Opened, open_all, sizes_of, unreadable
from mllm_cl.data.errors import some


def check_captions(recipe, file: TextIO | None = None) -> int:
    """Print what is in the tasks of a recipe; 0 if a run would start and end on them, else 2."""
    from mllm_cl.settings.retrieval import tasks_of  # which stands above all data

    console, problems = Console(file=file, highlight=False, soft_wrap=True), []
    console.print(f"\n{recipe.retrieval.data}", style="bold", markup=False)
    try:
        sequence = tasks_of(recipe)
    except ValueError as error:
        problems.append(str(error))
    else:
        sides = {"train": [one.train for one in sequence], "test": [one.eval for one in sequence]}
        opened = {f"{side} {task.name}": open_all(samples)
                  for side, sets in sides.items()
                  for task, samples in zip(sequence, sets, strict=True)}  # fmt: skip
        for words in _about(opened):
            console.print(words if isinstance(words, Text) else Text(words))
        bad = sum(len(one.bad) for one in opened.values())
        problems += [f"{bad} pictures cannot be read; mend or remove them"] if bad else []
    return verdict(console, problems)


def _about(opened: dict[str, Opened]) -> Iterator[str | Text]:
    for name, one in opened.items():
        counts = [len(captions) for captions in one.samples.captions]
        yield f"  {name:16} {len(counts)} pictures, {sum(counts)} captions, {_each(counts)} of each"
        yield f"  {'':16} {sizes_of(one)}"
        shared = _shared(one.samples) if name.startswith("test ") else []
        if shared:
            told = f"{name}: {len(shared)} captions are those of several pictures"
            yield Text(f"  {told}, which none of them can find: {some(shared)}", style="yellow")
    known = {one for name, side in opened.items() if name.startswith("train ")
             for one in side.hashes.values()}  # fmt: skip
    for name, one in opened.items():
        shown = [place for place, pixels in one.hashes.items() if pixels in known]
        if shown and name.startswith("test "):
            yield Text(f"  {len(shown)} pictures of {name} are in train", style="yellow")
    yield from unreadable(opened)


def _each(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _shared(samples: Captioned) -> list[str]:
    """The captions that more than one picture has."""
    seen: set[str] = set()
    found: dict[str, None] = {}
    for captions in samples.captions:
        found |= {one: None for one in dict.fromkeys(captions) if one in seen}
        seen |= set(captions)
    return list(found)
