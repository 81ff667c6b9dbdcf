"""The file that `classes.texts` names: what prompts call each class."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_cl.recipe.errors import RecipeError, nearest, shown
from mllm_cl.recipe.read import read_file

if TYPE_CHECKING:
    from mllm_cl.recipe.recipe import Recipe


def read_texts(path: str | None) -> Mapping[str, str]:
    """Class name -> text, from a YAML or JSON file, none without one; `${NAME}` in its path is
    filled in.

    RecipeError for a file that is not there or holds anything else.
    """
    from mllm_cl.data import filled  # which imports torch

    if path is None:
        return {}
    try:
        texts = read_file(Path(filled(path)).expanduser(), "names of classes")
    except RecipeError as error:
        raise RecipeError("classes.texts", f"{path}: {error.problem}") from None
    except ValueError as error:
        raise RecipeError("classes.texts", str(error)) from None
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            problem = f"{path} gives {name!r} {shown(text)}, expected words in quotes"
            raise RecipeError("classes.texts", problem)
    return texts


def check_texts(recipe: "Recipe", names: Sequence[str]) -> None:
    """RecipeError where what prompts would call the classes of a recipe is known to be wrong: ids
    that a method would read, classes without a text, texts of no class of the data.

    Classes of one text are warned of: nothing that reads tells them apart.
    """
    from mllm_cl.data.errors import some  # these import torch
    from mllm_cl.data.labelled import labelled

    block = recipe.classes
    if block.texts is None:
        ids = [name for name in names if re.fullmatch(r"n\d{8}", name)]
        if ids and recipe.method.reads:
            raise RecipeError(
                "classes.texts",
                f"is missing: {recipe.method_name} reads the names of classes, and {some(ids)} are "
                f"ids of WordNet. Name a YAML file with words for each, such as '{ids[0]}: "
                "goldfish'",
            )
        return
    path, texts = block.texts, read_texts(block.texts)
    missing = [name for name in names if name not in texts]
    if missing:
        others = [name for name in texts if name not in names]  # which may be misspelt
        problem = f"{path} has no text for {some(missing)}{nearest(missing[0], others)}"
        raise RecipeError("classes.texts", problem)
    if len(texts) > len(names):  # it may name more than those that are learnt
        args = {key: value for key, value in block.args.items() if key != "classes"}
        known = set(labelled(block.data, "train", 1, **args).names)
        unknown = [name for name in texts if name not in known]
        if unknown:
            raise RecipeError(
                "classes.texts", f"{path} names {some(unknown)}: no class of the data"
            )
    number = Counter(texts[name] for name in names)
    if shared := [text for text in number if number[text] > 1]:
        warnings.warn(f"{path} calls more than one class {some(shared)}", stacklevel=3)
