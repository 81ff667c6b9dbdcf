"""What class-incremental papers print, from the matrix of a run.

`A[b][k]` is the accuracy on the test images of stage k after stage b, both from 0, the answer being
any class seen so far; `counts[k]` is how many test images stage k has.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_cl.metrics.scores import ZERO_SHOT, Matrix, matrix

COUNTS = "counts"  # of a row: how many images each score is of
# Of a row: seen, unseen and harmonic_mean of answers by name, and alignment.
ZERO_SHOT_SCORES = "zero_shot"


def stage_accuracies(scores: Matrix, counts: Sequence[int]) -> list[float]:
    """A_b: the accuracy over all test images of the classes seen after stage b.

    A_b = sum_{k<=b} n_k A[b][k] / sum_{k<=b} n_k: stages count by their images, so this is not the
    mean of a row where stages differ in size.
    """
    return [_weighted(row[: b + 1], counts) for b, row in enumerate(scores)]


def average_incremental(scores: Matrix, counts: Sequence[int]) -> float:
    """A-bar, "average incremental accuracy": the mean of A_b over the stages. Source: iCaRL,
    arXiv:1611.07725.
    """
    found = stage_accuracies(scores, counts)
    return sum(found) / len(found) if found else math.nan


def performance_drop(scores: Matrix, counts: Sequence[int]) -> float:
    """PD = A_1 - A_B, lower is better, but a weak first stage lowers it, too. Source: few-shot
    class-incremental learning, arXiv:2104.03047.
    """
    found = stage_accuracies(scores, counts)
    return found[0] - found[-1] if found else math.nan


def old_and_new(scores: Matrix, counts: Sequence[int]) -> list[tuple[float, float, float]]:
    """After each stage: accuracy on the classes of earlier stages, on the new ones, and the
    harmonic mean 2 o n / (o + n); NaN where there is nothing old yet.
    """
    found = []
    for b, row in enumerate(scores):
        old, new = _weighted(row[:b], counts), float(row[b])
        harmonic = 2 * old * new / (old + new) if old + new else 0.0
        found.append((old, new, harmonic))
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers of a run after its last stage, from rows with `scores` and `COUNTS`: A-bar, the
    last A_B, the drop, and the last stage's old, new and harmonic mean. None where undefined.

    Of answers by name, as far as rows have them, the means over the stages after which there are
    classes to come; of captions the last `alignment`.
    """
    learnt = [row for row in rows if row["after"] != ZERO_SHOT]
    if not learnt:
        return {}
    tasks = [row["after"] for row in learnt]
    scores, counts = matrix(learnt, tasks), [learnt[-1][COUNTS][name] for name in tasks]
    old, new, harmonic = old_and_new(scores, counts)[-1]
    found = {
        "average_incremental": average_incremental(scores, counts),
        "last": stage_accuracies(scores, counts)[-1],
        "performance_drop": performance_drop(scores, counts),
        "old": old,
        "new": new,
        "harmonic_mean": harmonic,
    }
    found |= _by_name([row[ZERO_SHOT_SCORES] for row in learnt if ZERO_SHOT_SCORES in row])
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _by_name(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    whole = [row for row in rows if row["unseen"] is not None]
    keys = ("seen", "unseen", "harmonic_mean") if whole else ()
    found = {f"zero_shot_{key}": sum(row[key] for row in whole) / len(whole) for key in keys}
    aligned = [row["alignment"] for row in rows if "alignment" in row]
    return found | ({"alignment": aligned[-1]} if aligned else {})


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float:
    total = sum(counts[: len(values)])
    pairs = zip(values, counts, strict=False)
    return sum(value * count for value, count in pairs) / total if total else math.nan
