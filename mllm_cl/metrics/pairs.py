"""What every metric takes: predictions and, for each, one reference or several that are right."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

Reference = str | Sequence[str]
Metric = Callable[[Sequence[str], Sequence[Reference]], float]


def pairs(
    predictions: Sequence[str], references: Sequence[Reference]
) -> list[tuple[str, list[str]]]:
    """Each prediction with the list of its references.

    Raises ValueError when the two differ in number, when there are none, and when a sample has an
    empty list of references.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"found {len(predictions)} predictions for {len(references)} references, "
            "expected one each and at least one"
        )
    several = [[each] if isinstance(each, str) else list(each) for each in references]
    if not all(several):
        raise ValueError(
            f"sample {several.index([])} has an empty list of references, expected at least one"
        )
    return list(zip(predictions, several, strict=True))


def most_common(references: Sequence[Reference]) -> str:
    """The right answer that most samples share, the first of those that tie: whoever gives it every
    time has learnt nothing.
    """
    several = [[each] if isinstance(each, str) else dict.fromkeys(each) for each in references]
    return Counter(answer for answers in several for answer in answers).most_common(1)[0][0]


def mean(values: Sequence[float]) -> float:
    """The mean of one number per sample."""
    return sum(values) / len(values)


def normalised(answer: str) -> str:
    """The answer in lower case, with single spaces and without final punctuation."""
    return " ".join(answer.casefold().split()).rstrip(".!?").rstrip()


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a contraction is one word."""
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())
