"""Metrics that ask whether an answer is the right one: to the letter, in substance, nearly, or as a
place in the picture.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from mllm_cl.metrics.pairs import Reference, mean, normalised, pairs

OPTION = re.compile(  # how answers name one option by its letter
    r"^\W*([A-Za-z])\W*$"  # the whole answer is a letter
    r"|^\W*([A-Z])[).:,\]]"  # B. text   (B) text   B: text
    r"|\(([A-Z])\)"  # it is (B)
    r"|(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|must\s+be))?[\s:*(\[]*)([A-Z])\b(?!['’])"
)
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
BOX = re.compile(rf"(?<![\w.]){NUMBER}(?:[\s,;()\[\]{{}}<>]+{NUMBER}){{3}}(?![\w])")


def exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The share of predictions that equal one of their references, character by character.

    Raises ValueError when the two differ in number, or when there are none.
    """
    return mean([answer in right for answer, right in pairs(predictions, references)])


def normalised_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The share that equal a reference but for case, spaces and a final full stop, ! or ?"""
    found = pairs(predictions, references)
    return mean([normalised(answer) in map(normalised, right) for answer, right in found])


def multiple_choice(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The share that name the right option, by its letter or by its text.

    A reference is the letter, the text, or both as in "B. a cat"; letter and text may also be two
    references. Of a prediction counts its letter ("B", "(B)", "B. a cat", "The answer is B") or,
    where it has none, its text; two different letters are no answer.
    """
    return mean([_chosen(answer, right) for answer, right in pairs(predictions, references)])


def anls(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Average normalised Levenshtein similarity, for text that is read from a picture.

        s = 1 - d(a, r) / max(|a|, |r|), 0 where s <= 0.5; the best reference counts

    Case and repeated spaces do not count. Source: arXiv:1905.13648, with its threshold 0.5.
    """
    return mean(
        [
            max(_similarity(answer, each) for each in right)
            for answer, right in pairs(predictions, references)
        ]
    )


def iou_50(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """The share of boxes whose overlap with a reference, intersection over union, is at least 0.5.

    A box is the first four numbers x1, y1, x2, y2 in a row, in whatever brackets:
    "[10, 20, 110, 220]", "(10,20),(110,220)". Both sides must use the same units. A prediction
    without a box is wrong; a reference without one is a ValueError.
    """
    return mean(
        [
            any(_iou(_box(answer), _reference_box(each)) >= 0.5 for each in right)
            for answer, right in pairs(predictions, references)
        ]
    )


def _letter(answer: str) -> str | None:
    """The option that an answer names; None without one, or with several."""
    found = {"".join(groups).upper() for groups in OPTION.findall(answer.strip())}
    return found.pop() if len(found) == 1 else None


def _text(answer: str) -> str:
    """The text of an option without the letter before it."""
    return normalised(re.sub(r"^\W*[A-Z][).:\]]+\s+", "", answer.strip()))


def _chosen(answer: str, right: list[str]) -> bool:
    texts = [_text(each) for each in right]
    if normalised(answer) in texts:  # before letters are looked for: "U.S. dollars" names no U
        return True
    chosen, letters = _letter(answer), {_letter(each) for each in right} - {None}
    return chosen in letters if chosen and letters else _text(answer) in texts


def _similarity(answer: str, right: str) -> float:
    a, b = (" ".join(text.casefold().split()) for text in (answer, right))
    share = 1 - distance(a, b) / max(len(a), len(b), 1)
    return share if share > 0.5 else 0.0


def distance(a: str, b: str) -> int:
    """The Levenshtein distance: insertions, deletions and replacements from one to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for (diagonal, up), y in zip(pairwise(above), b, strict=True):
            row.append(min(up + 1, row[-1] + 1, diagonal + (x != y)))
    return row[-1]


def _box(text: str) -> tuple[float, ...] | None:
    found = BOX.search(text)
    return tuple(map(float, re.findall(NUMBER, found.group()))) if found else None


def _reference_box(text: str) -> tuple[float, ...]:
    box = _box(text)
    if box is None or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"the reference {text!r} holds no box; expected four numbers x1, y1, x2, y2 with "
            "x1 < x2 and y1 < y2"
        )
    return box


def _iou(a: tuple[float, ...] | None, b: tuple[float, ...]) -> float:
    if a is None or a[0] >= a[2] or a[1] >= a[3]:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)
