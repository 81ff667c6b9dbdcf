"""Types of settings: ranges of numbers, the fields of TrainingArguments, and a type in words."""

import ast
import dataclasses
import functools
import importlib.util
import math
import operator
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

FINITE = 1e30


class Between(NamedTuple):
    """The closed range of a number."""

    low: float
    high: float = math.inf


Count = Annotated[int, Between(1)]


def in_words(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    simple |= {type(None): "null", Any: "anything"}
    if origin is Annotated:
        limits = [each for each in inner[1:] if isinstance(each, Between)]
        lower = [f" of at least {limit.low:g}" for limit in limits if limit.low > -FINITE]
        upper = [f" and at most {limit.high:g}" for limit in limits if limit.high < FINITE]
        return in_words(inner[0]) + "".join(lower + upper)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (list, tuple):
        return f"a list of {in_words(inner[0])}" if inner else "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    return simple.get(hint, str(hint))


@functools.cache
def training_hints() -> dict[str, Any]:
    """Name -> type of every field of the installed `transformers.TrainingArguments`.

    Read from the source text: importing the class takes seconds, and a typing error should not.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    enums: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for name in ("trainer_utils.py", "training_args.py"):
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                hints = {line.target.id: _hint(line.annotation, enums) for line in fields}
            elif isinstance(node, ast.ClassDef):
                texts = [line.value for line in node.body if isinstance(line, ast.Assign)]
                enums[node.name] = [text.value for text in texts if isinstance(text, ast.Constant)]
    assert hints, f"{folder}/training_args.py declares no TrainingArguments"
    return hints


def _hint(node: ast.expr, enums: Mapping[str, list[str]]) -> Any:
    """The type that an annotation names; what recipes need not tell apart is Any."""
    simple = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict[str, Any]}
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _hint(ast.parse(text, mode="eval").body, enums)
        case ast.Name(id=name) if name in simple:
            return simple[name]
        case ast.Name(id=name) if enums.get(name):
            return Literal[tuple(enums[name])]
        case ast.BinOp(left=left, right=right):
            sides = [_hint(left, enums), _hint(right, enums)]
            if get_origin(sides[0]) is Literal and sides[1] is str:
                return sides[0]  # an enum that may be written as text
            return sides[0] | sides[1]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _hint(inner, enums) | None
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=several)):
            return functools.reduce(operator.or_, (_hint(inner, enums) for inner in several))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_hint(inner, enums)]
        case ast.Subscript(value=ast.Name(id="dict")):
            return dict[str, Any]
    return Any
