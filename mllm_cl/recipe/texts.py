"""The file that `classes.texts` names: what prompts call each class."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mllm_cl.recipe.errors import RecipeError, nearest, shown
from mllm_cl.recipe.read import read_file


def read_texts(path: str) -> Mapping[str, str]:
    """Class name -> text, from a YAML or JSON file; `${NAME}` in its path is filled in.

    RecipeError for a file that is not there or holds anything else.
    """
    from mllm_cl.data import filled  # which imports torch

    try:
        texts = read_file(Path(filled(path)).expanduser())
    except RecipeError as error:
        raise RecipeError("classes.texts", f"{path}: {error.problem}") from None
    except ValueError as error:
        raise RecipeError("classes.texts", str(error)) from None
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            problem = f"{path} gives {name!r} {shown(text)}, expected words in quotes"
            raise RecipeError("classes.texts", problem)
    return texts


def check_texts(path: str, names: Sequence[str], every: Callable[[], Sequence[str]]) -> None:
    """RecipeError where classes have no text, or texts no class among `every` of the data's.

    Classes of one text are warned of: nothing that reads tells them apart.
    """
    from mllm_cl.data.errors import some  # whose package imports torch

    texts = read_texts(path)
    missing = [name for name in names if name not in texts]
    if missing:
        problem = f"{path} has no text for {some(missing)}{nearest(missing[0], texts)}"
        raise RecipeError("classes.texts", problem)
    if len(texts) > len(names):  # it may name more than those that are learnt
        known = set(every())
        unknown = [name for name in texts if name not in known]
        if unknown:
            raise RecipeError(
                "classes.texts", f"{path} names {some(unknown)}: no class of the data"
            )
    number = Counter(texts[name] for name in names)
    if shared := [text for text in number if number[text] > 1]:
        warnings.warn(f"{path} calls more than one class {some(shared)}", stacklevel=3)
