"""The file that `classes.descriptions` names: what classes look like, in words."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from mllm_cl.model.descriptions import Descriptions, read_descriptions
from mllm_cl.recipe.blocks import ClassesBlock
from mllm_cl.recipe.errors import RecipeError, nearest
from mllm_cl.recipe.texts import read_texts

KEY, TOY = "classes.descriptions", "toy:"


def descriptions_print(path: str) -> str:
    """What tells a file's words from others."""
    if path.startswith(TOY):
        return path
    return hashlib.sha256(descriptions_file(path).read_bytes()).hexdigest()


def descriptions_file(path: str) -> Path:
    """Where the file is; `${NAME}` in its path is filled in. RecipeError without it."""
    from mllm_cl.data import filled  # which imports torch

    try:
        return Path(filled(path)).expanduser()
    except ValueError as error:
        raise RecipeError(KEY, str(error)) from None


def descriptions_of(block: ClassesBlock, names: Sequence[str]) -> Descriptions:
    """What the file says of these classes, by their names; it may have what prompts call them as
    keys instead. RecipeError for a file that is not there or is none.
    """
    from mllm_cl.data.toy_classes import toy_descriptions  # these import torch
    from mllm_cl.model.texts import called_by

    if block.descriptions is None:
        return Descriptions()
    try:
        if block.descriptions.startswith(TOY):
            return toy_descriptions(block.descriptions.removeprefix(TOY))
        found = read_descriptions(descriptions_file(block.descriptions))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(KEY, str(error)) from None
    words = called_by(names, read_texts(block.texts))
    # One class may be called by the name of another, which is that one's key.
    return found.renamed({text: name for name, text in words.items() if text not in words})


def check_descriptions(block: ClassesBlock, names: Sequence[str], needed: Collection[str]) -> None:
    """RecipeError with names where a method needs what is not there."""
    from mllm_cl.data.errors import some  # whose package imports torch

    if needed and block.descriptions is None:
        raise RecipeError(
            KEY,
            "is missing: this method learns from words for what classes look like. Name a JSON "
            "file of them; 'mllm-cl describe' has a language model write one",
        )
    found = descriptions_of(block, names) if needed else Descriptions()
    missing = found.missing(names, needed)
    if missing:
        problem = f"{block.descriptions} says nothing of {some(missing)}; 'mllm-cl describe' fills"
        raise RecipeError(KEY, f"{problem} gaps{nearest(missing[0], found.classes)}")
