"""From what YAML holds to what a dataclass declares: typed, in range, every key known."""

import dataclasses
import re
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mllm_cl.recipe.errors import RecipeError, dotted, shown, unknown, unlisted
from mllm_cl.recipe.hints import Between, in_words


def build(kind: type, settings: Any, key: str, given: Mapping[str, Any] | None = None) -> Any:
    """An instance of a dataclass from keys and values, all of them known, typed and in range.

    `given` are fields that are set already and may not be set again. Raises RecipeError.
    """
    given = given or {}
    if not isinstance(settings, dict):
        raise RecipeError(key, f"found {shown(settings)}, expected keys and values")
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: each for name, each in settable(kind).items() if name not in given}
    refuse_unknown(settings, fields, key)
    for name, each in fields.items():
        needed = each.default is each.default_factory is dataclasses.MISSING
        if needed and name not in settings:
            raise RecipeError(f"{key}.{name}", f"is missing; expected {in_words(hints[name])}")
    values = {name: convert(each, hints[name], f"{key}.{name}") for name, each in settings.items()}
    try:
        return kind(**values, **given)
    except RecipeError as error:
        raise RecipeError(f"{key}.{error.key}", error.problem) from None
    except ValueError as error:
        raise RecipeError(key, str(error)) from None


def settable(kind: type) -> dict[str, dataclasses.Field]:
    """The fields that whoever makes a dataclass may set, by name."""
    return {each.name: each for each in dataclasses.fields(kind) if each.init}


def refuse_unknown(settings: Mapping[str, Any], known: Collection[str], key: str) -> None:
    """RecipeError for the first setting of the block at `key` that nobody reads."""
    for name, value in settings.items():
        if name not in known:
            raise unknown(f"{key}.{name}", value, known)


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that a field declares, without guessing; raises RecipeError.

    Two traps of YAML 1.1 are undone: `1e-3`, which it reads as text, is a number where a number is
    expected, and a bare `no`, which it reads as false, is "no" where that is one of the choices.
    """
    origin, inner = get_origin(hint), get_args(hint)
    wrong = RecipeError(key, f"found {shown(value)}, expected {in_words(hint)}")
    if hint is Any:
        return plain(value, key)
    if origin is Annotated:
        result = convert(value, inner[0], key)
        for limit in (each for each in inner[1:] if isinstance(each, Between)):
            if isinstance(result, (int, float)) and not limit.low <= result <= limit.high:
                raise wrong
        return result
    if origin in (Union, types.UnionType):
        return _convert_union(value, inner, key, wrong)
    if hint is type(None):
        raise wrong  # null itself is taken by the union it stands in
    if origin is Literal:
        value = "no" if value is False and "no" in inner else value
        if not any(value == each and type(value) is type(each) for each in inner):
            raise wrong if not isinstance(value, str) else unlisted(key, value, inner)
        return value
    if origin in (list, tuple):
        fixed = origin is tuple and ... not in inner
        if not isinstance(value, list) or (fixed and len(inner) != len(value)):
            raise wrong
        kinds = inner if fixed else [inner[0]] * len(value)
        pairs = enumerate(zip(value, kinds, strict=True))
        return origin([convert(item, kind, f"{key}.{i}") for i, (item, kind) in pairs])
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {name: convert(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    return _convert_scalar(value, hint, wrong)


def _convert_scalar(value: Any, hint: Any, wrong: RecipeError) -> Any:
    assert hint in (bool, int, float, str), f"{wrong.key}: a recipe cannot hold {hint}"
    exponent = r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"
    text = isinstance(value, str) and re.fullmatch(exponent, value)
    if hint is float and (text or type(value) is int):
        value = float(value)
    if type(value) is not hint or value != value:  # a bool is no int, and NaN is no number
        raise wrong
    return value


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str, wrong: RecipeError) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:  # so that an error deep inside keeps its own key
        return convert(value, kinds[0], key)
    for kind in kinds:
        try:
            return convert(value, kind, key)
        except RecipeError:
            continue
    raise wrong


def plain(value: Any, key: str) -> Any:
    """The same as dicts, lists and scalars only, or RecipeError."""
    if isinstance(value, dict):
        return {name: plain(item, dotted(key, name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, dotted(key, index)) for index, item in enumerate(value)]
    if not (value is None or isinstance(value, (bool, int, float, str))) or value != value:
        raise RecipeError(key, f"found {shown(value)}, expected text, numbers, lists or keys")
    return value
