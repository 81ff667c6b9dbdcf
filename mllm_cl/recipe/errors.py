"""What is wrong with a recipe: the key, what was found there, and what was expected."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mllm_cl.recipe.hints import in_words


class RecipeError(ValueError):
    """Something in a recipe or its overrides is wrong; `key` is the dotted key it is about."""

    def __init__(self, key: str, problem: str, source: str = ""):
        super().__init__(key, problem, source)
        self.key, self.problem, self.source = key, problem, source

    def __str__(self) -> str:
        parts = (self.source, self.key, self.problem)
        return ": ".join(" ".join(part.split()) for part in parts if part)


def dotted(key: str, name: object) -> str:
    """The key of what is called `name` in the block at `key`; the recipe itself is ""."""
    return f"{key}.{name}" if key else f"{name}"


def shown(value: Any) -> str:
    """The value as the reader would recognise it, with its kind where YAML may have surprised."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a bare yes, no, on or off counts; quote it to mean the word)"
    if isinstance(value, (dict, list)):
        text = json.dumps(value, default=str)
    else:
        text = repr(value) if isinstance(value, (str, int, float)) else str(value)
    kind = {str: "text", dict: "keys and values", list: "a list"}
    kind |= {int: "a whole number", float: "a number"}
    short = text[:57] + "..." if len(text) > 60 else text
    return f"{short} ({kind.get(type(value), type(value).__name__)})"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if any looks like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the known name that was probably meant, or all of a few; or ""."""
    known = list(known)
    near = closest(name, known)
    if near is not None:
        return f"; did you mean {near!r}?"
    return f"; known are {', '.join(known)}" if 0 < len(known) <= 20 else ""


def unlisted(key: str, value: str, choices: tuple[Any, ...]) -> RecipeError:
    """The error of a text that is none of the choices."""
    near = closest(value, map(str, choices))
    hint = f"; did you mean {near!r}?" if near is not None else ""
    return RecipeError(key, f"found {value!r}, expected {in_words(Literal[choices])}{hint}")


def unknown(
    key: str, value: Any, known: Iterable[str], homes: Mapping[str, str] | None = None
) -> RecipeError:
    """The error of a key that nobody reads; `homes` says where misplaced keys belong."""
    name = key.rpartition(".")[2]
    hint = f"; it belongs in {homes[name]!r}" if homes and name in homes else nearest(name, known)
    return RecipeError(key, f"unknown key (found {shown(value)}){hint}")
