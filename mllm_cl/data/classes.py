"""The order in which classes are learnt, and how many come in each stage.

`BmIncn` of the literature is `first=m, increment=n`; B0 Incn, equal stages, is `first=0`.
"""

from collections.abc import Sequence
from itertools import accumulate

from numpy.random import RandomState


def class_order(number: int, seed: int | None) -> tuple[int, ...]:
    """`number` classes in the order in which they are learnt; without a seed in their own.

    NumPy's legacy `permutation`, which published tables draw with seed 1993; its global random
    state is left alone.
    """
    if number < 1:
        raise ValueError(f"there are {number} classes to order, expected at least 1")
    if seed is None:
        return tuple(range(number))
    if not 0 <= seed < 2**32:
        raise ValueError(f"the class order's seed is {seed}, expected 0 to {2**32 - 1}")
    return tuple(RandomState(seed).permutation(number).tolist())


def stage_sizes(number: int, first: int, increment: int) -> tuple[int, ...]:
    """How many of `number` classes are new in each stage: `first`, then `increment` each.

    `first` 0 stands for `increment`. What is left over at the end is a smaller last stage.
    """
    if increment < 1:
        raise ValueError(f"increment is {increment}, expected at least 1 new class a stage")
    if first < 0:
        raise ValueError(f"first is {first}, expected 0 (as many as increment) or more")
    begin = first or increment
    if begin > number:
        key = "first" if first else "increment"
        raise ValueError(f"{key} is {begin}, but there are {number} classes; lower it")
    rest = number - begin
    later = [increment] * (rest // increment) + [rest % increment]
    return tuple(size for size in (begin, *later) if size)


def stage_names(sizes: Sequence[int]) -> list[str]:
    """What stages of so many classes are called, by their places in the order: `1-50`, `51-60` …"""
    pairs = zip(sizes, accumulate(sizes), strict=True)
    return [f"{end - size + 1}-{end}" for size, end in pairs]


def stages(
    names: Sequence[str], first: int, increment: int, order_seed: int | None
) -> list[tuple[str, ...]]:
    """The classes that are new in each stage; one after another they are the class order."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class names must be unique, but these appear twice: {', '.join(twice)}")
    sizes = stage_sizes(len(names), first, increment)
    left = iter([names[place] for place in class_order(len(names), order_seed)])
    return [tuple(next(left) for _ in range(size)) for size in sizes]
