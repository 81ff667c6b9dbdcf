"""Facts of published benchmarks and their prompts, read from the two tables beside this file."""

import re
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set as published tables use it; benchmarks.yaml says what each line means.

    `sizes` holds train and test images as far as they are published; `hub` is empty where the data
    lie in a folder.
    """

    title: str
    classes: int
    splits: list[str]
    templates: str
    data: str
    named: bool = True
    note: str = ""
    of: int | None = None
    order_seed: int | None = 1993
    sizes: dict[str, int] = field(default_factory=dict)
    hub: str = ""
    args: dict[str, str] = field(default_factory=dict)

    def stages(self) -> list[tuple[int, int]]:
        """First stage and increment of each split."""
        both = (re.fullmatch(r"B(\d+) Inc(\d+)", split) for split in self.splits)
        return [(int(found[1]), int(found[2])) for found in both]


def benchmark(name: str) -> Benchmark:
    """The facts of one; ValueError for a name that is not in the table."""
    return Benchmark(**_of("benchmarks", name, "benchmark"))


def classes_block(name: str, first: int, increment: int, *, of_clip: bool) -> dict[str, Any]:
    """The block `classes` of a recipe for one of a benchmark's splits, with CLIP or without.

    What is not on the hub is looked for in a folder of its name below `${MLLM_CL_CIL}`, and what
    its classes are called in a YAML file beside it.
    """
    facts, place = benchmark(name), f"${{MLLM_CL_CIL:-data/cil}}/{name}"
    block: dict[str, Any] = {
        "data": facts.hub or place,
        "number": facts.classes,
        "first": 0 if first == increment else first,
        "increment": increment,
        "order": facts.order_seed,
        "preprocessing": "clip" if of_clip else "paper_compat",
    }
    block |= {"templates": facts.templates} if of_clip else {}
    block |= {"texts": f"{place}.yaml"} if of_clip and not facts.named else {}
    return block | ({"args": facts.args} if facts.args else {})


def templates(key: str) -> tuple[str, ...]:
    """Prompts with {} for the name of a class: the first trains, all of them together test."""
    written = _of("templates", key, "templates")
    return tuple(text for line in written for text in _expanded(line))


def names() -> tuple[str, ...]:
    """The names of all benchmarks."""
    return tuple(_table("benchmarks"))


def _expanded(line: str) -> list[str]:
    """The line with each choice of its brackets, [a|the], in turn."""
    parts = re.split(r"\[([^]]*)\]", line)
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(words) for words in product(*choices)]


def _of(table: str, key: str, what: str):
    known = _table(table)
    if key not in known:
        raise ValueError(f"there is no {what} {key!r}; there is {', '.join(known)}")
    return known[key]


@cache
def _table(name: str) -> dict:
    return yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))
