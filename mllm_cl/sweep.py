"""One recipe under several settings: every combination is a run in a folder of its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_cl.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Cell:
    """One combination of a sweep: its name, which is its folder's, and its recipe."""

    name: str
    recipe: Recipe


def split_sweep(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a command line without `--sweep KEY=A,B KEY=C,D`, and its values by key.

    Commas inside brackets, braces and quotes do not separate values.
    """
    words = list(words)
    if "--sweep" not in words:
        return words, {}
    start = words.index("--sweep")
    end = start + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    axes: dict[str, list[str]] = {}
    for word in words[start + 1 : end]:
        key, equals, text = word.partition("=")
        values = _values(text)
        if not equals or not key or not all(values):
            raise RecipeError("sweep", f"found {word!r}, expected KEY=VALUE,VALUE such as seed=0,1")
        if key in axes or key == "output_dir" or len(set(values)) < len(values):
            raise RecipeError("sweep", f"found {word!r}: every cell needs a setting of its own")
        axes[key] = values
    if not axes:
        raise RecipeError("sweep", "found nothing, expected KEY=VALUE,VALUE such as seed=0,1")
    return words[:start] + words[end:], axes


def _values(text: str) -> list[str]:
    """The parts of `text` between commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def cells(
    path: str | Path, overrides: Sequence[str], axes: Mapping[str, Sequence[str]]
) -> list[Cell]:
    """Every combination of `axes`, the last one fastest, all checked before any of them runs.

    A cell's folder is `output_dir/KEY=VALUE,KEY=VALUE` of the recipe.
    """
    root, found = _root(path, overrides, axes), []
    for values in itertools.product(*axes.values()):
        pairs = dict(zip(axes, values, strict=True))
        name = ",".join(f"{key}={_plain(value)}" for key, value in pairs.items())
        words = [f"--{key}={value}" for key, value in pairs.items()]
        words += [f"--output_dir={root / name}"]
        kept = _without(overrides, "output_dir")
        found.append(Cell(name, Recipe.load(path, [*kept, *words])))
    twice = [cell.name for cell in found if sum(cell.name == one.name for one in found) > 1]
    if twice:
        raise RecipeError("sweep", f"two cells would share the folder {twice[0]!r}")
    return found


def _root(path: str | Path, overrides: Sequence[str], axes: Mapping[str, Sequence[str]]) -> Path:
    first = [f"--{key}={values[0]}" for key, values in axes.items()]
    return Path(Recipe.load(path, [*overrides, *first]).output_dir)


def _without(words: Sequence[str], key: str) -> list[str]:
    """Overrides without the one of `key`, in either of its forms."""
    kept, skip = [], False
    for word in words:
        if not skip and word != f"--{key}" and not word.startswith(f"--{key}="):
            kept.append(word)
        skip = word == f"--{key}"
    return kept


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_") or "_"


def chosen(found: Sequence[Cell], index: str | None) -> Sequence[Cell]:
    """All cells, or the one that `--cell` names by its number, for job arrays."""
    if index is None:
        return found
    if not index.isdecimal() or int(index) >= len(found):
        raise RecipeError("cell", f"found {index!r}, expected 0 to {len(found) - 1}")
    return [found[int(index)]]
