"""How answers are scored: every metric maps (predictions, references) to [0, 1], higher is better.

The gap between `normalised_match` and `exact_match` is forgetting of the answer's form, not of
its content (arXiv:2505.02486).
"""

import difflib
from collections.abc import Callable, Sequence

Metric = Callable[[Sequence[str], Sequence[str]], float]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that equal their reference, character by character.

    Raises ValueError when the two differ in number, or when there are none.
    """
    return _share([a == b for a, b in _pairs(predictions, references)])


def normalised_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share that equal their reference but for case, spaces and a final full stop, ! or ?"""
    return _share([normalised(a) == normalised(b) for a, b in _pairs(predictions, references)])


def normalised(answer: str) -> str:
    """The answer in lower case, with single spaces and without final punctuation."""
    return " ".join(answer.casefold().split()).rstrip(".!?").rstrip()


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
}


def metric(name: str) -> Metric:
    """The metric of that name; ValueError names the nearest one."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown metric {name!r}; {hint}known are {', '.join(METRICS)}")
    return METRICS[name]


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"found {len(predictions)} predictions for {len(references)} references, "
            "expected one each and at least one"
        )
    return list(zip(predictions, references, strict=True))


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)
