"""A recipe's YAML and the overrides of a command line, read into one tree of plain data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm_cl.recipe.errors import RecipeError, dotted, nearest, shown

DEEPEST = 50  # levels; the time that PyYAML takes grows with their square


def read_file(path: Path, keys: str = "model, method, tasks ...") -> dict[str, Any]:
    """The keys and values of a YAML file. RecipeError says why it holds none, where `keys` were
    expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError("", f"no such recipe{nearest(path.name, names)}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError("", "is not a text file in UTF-8") from None
    tree = parse(text, "")
    if not isinstance(tree, dict):
        raise RecipeError("", f"found {shown(tree)}, expected keys ({keys})")
    return tree


def parse(text: str, key: str) -> Any:
    """YAML without its surprises: no alias, no key twice, no key that is not text."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RecipeError(key, "is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                problem = f"found the alias *{event.anchor}, expected values written out"
                raise RecipeError(key, problem)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), key)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(key, f"is not YAML: {error.problem or error.context}{where}") from None
    except RecursionError:
        raise RecipeError(key, "is nested too deeply") from None
    except (
        KeyError,
        AttributeError,
        IndexError,
    ):  # PyYAML at `!!bool x`, `!!timestamp x`, `!!int ""`
        raise RecipeError(
            key, "is not YAML: a value is not of the type that its tag says"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(key, f"is not YAML: {error}") from None


def _check_keys(node: yaml.Node | None, key: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, dotted(key, index))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, item in node.value:
            here, line = dotted(key, name.value), name.start_mark.line + 1
            if name.tag != "tag:yaml.org,2002:str":
                problem = f"found the key {name.value!r} in line {line}, expected text in quotes"
                raise RecipeError(key, problem)
            if name.value in seen:
                raise RecipeError(here, f"is set twice, the second time in line {line}")
            seen.add(name.value)
            _check_keys(item, here)


def split_overrides(words: Sequence[str]) -> dict[str, str]:
    """Dotted key -> text of `--key value` and `--key=value`."""
    texts: dict[str, str] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            problem = f"found {word!r} on the command line, expected an override such as --seed 1"
            raise RecipeError("", problem)
        if not equals and (not pending or pending[0].startswith("--")):
            raise RecipeError(key, f"has no value on the command line; write --{key} VALUE")
        if key in texts:
            raise RecipeError(key, "is given twice on the command line")
        texts[key] = text if equals else pending.pop(0)
    return texts


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.0.b` in nested dicts and lists."""
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        here = ".".join(key.split(".")[:depth])
        if isinstance(node, list):
            if not (part.isdecimal() and int(part) < len(node)):
                problem = f"found {part!r} after {here}, expected 0 to {len(node) - 1}"
                raise RecipeError(key, problem)
            part = int(part)
        elif not isinstance(node, dict) or not part:
            raise RecipeError(key, f"names no setting: {here or 'the recipe'} is {shown(node)}")
        if depth == len(parents):
            node[part] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]


def refuse_remote_code(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """RecipeError if the file asks for a model's own code and the command line does not."""
    model = tree.get("model")
    asked = isinstance(model, dict) and model.get("trust_remote_code")
    if asked and "model.trust_remote_code" not in given:
        # recipes are passed on; to run a model's own code is the decision of who types the command
        problem = "found true, but a file may not ask for it; type --model.trust_remote_code true"
        raise RecipeError("model.trust_remote_code", problem)
