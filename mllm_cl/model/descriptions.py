"""What classes look like, in words: a JSON file that people or a language model have written.

    {"version": 1,
     "classes": {"cat": ["slit pupils", ...], ...},                of a class by itself
     "pairs": {"cat": {"lynx": ["a long tail", ...], ...}, ...}}   of cats, where it may be a lynx

Either part may be left out. The released code of ENGINE (arXiv:2503.08510) has files of pairs
alone, {"cat": {"lynx": [...]}}, which are read, too.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Descriptions:
    """`classes[A]` describe a class by itself, `pairs[A][B]` what A has and B has not."""

    classes: Mapping[str, Texts] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, Texts]] = field(default_factory=dict)

    def of(self, name: str) -> Texts:
        """What is said of a class by itself."""
        return self.classes.get(name, ())

    def against(self, name: str, other: str) -> Texts:
        """What is said of a class where another is the alternative."""
        return self.pairs.get(name, {}).get(other, ())

    def pooled(self, name: str, others: Collection[str] | None) -> Texts:
        """All that is said of a class against some others, or against any (None); each once."""
        own = self.pairs.get(name, {})
        found = (text for other, texts in own.items() if others is None or other in others
                 for text in texts)  # fmt: skip
        return tuple(dict.fromkeys(found))

    def missing(self, names: Sequence[str], parts: Collection[str]) -> list[str]:
        """What the `parts` ("classes", "pairs") lack of these classes, in words.

        A class of which nothing is said by itself has to be compared with all the others instead.
        """
        found = []
        for name in names:
            others = [other for other in names if other != name]
            gaps = [other for other in others if not self.against(name, other)]
            if "classes" in parts and not self.of(name) and (gaps or not others):
                found.append(name)
            elif "pairs" in parts:
                found += [f"{name} against {other}" for other in gaps]
        return found

    def renamed(self, names: Mapping[str, str]) -> "Descriptions":
        """The same with other names for classes, where there are any."""
        pairs = {
            names.get(one, one): {names.get(other, other): texts for other, texts in own.items()}
            for one, own in self.pairs.items()
        }
        return Descriptions({names.get(one, one): own for one, own in self.classes.items()}, pairs)

    def joined(self, other: "Descriptions") -> "Descriptions":
        """These, and what the other has besides."""
        pairs = {name: dict(own) for name, own in self.pairs.items()}
        for name, own in other.pairs.items():
            pairs[name] = {**own, **pairs.get(name, {})}
        return Descriptions({**other.classes, **self.classes}, pairs)

    def text(self) -> str:
        """The file's text."""
        tree = {"version": VERSION, "classes": self.classes, "pairs": self.pairs}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def told(name: str, text: str) -> str:
    """A description as the text tower reads it, in the words of the released code."""
    return f"{name} with {text.lower()}"


def read_descriptions(path: str | Path) -> Descriptions:
    """What a file says. ValueError with the place in it for what is no such file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of descriptions")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    try:
        return _descriptions(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _descriptions(tree: Any) -> Descriptions:
    tree = _mapping(tree, "the file")
    if "version" not in tree:
        return Descriptions({}, _nested(tree, ""))
    if tree["version"] != VERSION:
        raise ValueError(f"version is {tree['version']!r}, expected {VERSION}")
    unknown = sorted(tree.keys() - {"version", "classes", "pairs"})
    if unknown:
        raise ValueError(f"found {unknown[0]!r}, expected 'version', 'classes' and 'pairs'")
    classes = _each(tree.get("classes", {}), "classes", _texts)
    return Descriptions(classes, _nested(tree.get("pairs", {}), "pairs"))


def _nested(tree: Any, place: str) -> dict[str, dict[str, Texts]]:
    return _each(tree, place, lambda own, where: _each(own, where, _texts))


def _each(tree: Any, place: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    return {
        name: read(value, f"{place}.{name}".lstrip("."))
        for name, value in _mapping(tree, place or "the file").items()
    }


def _mapping(tree: Any, place: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{place} is a {type(tree).__name__}, expected names of classes as keys")
    return tree


def _texts(value: Any, place: str) -> Texts:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{place} is {json.dumps(value)[:60]}, expected a list of texts")
    return tuple(one.strip() for one in value if one.strip())
