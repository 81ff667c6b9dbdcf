"""The matrix of a continual run, and the numbers that are derived from it.

`A[t][i]` is the score on task i after task t, both counted from 0 and in the order of learning;
T tasks have been learnt. What was not evaluated is NaN, and so is every result that needs it:
nothing is averaged over a hole.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]
ZERO_SHOT = "zero-shot"  # the row before any training


def last(scores: Matrix) -> list[float]:
    """The scores of all learnt tasks after the last one: A[T-1][i]."""
    return list(scores[-1][: len(scores)])


def average(scores: Matrix) -> float:
    """Mean final accuracy (MFN): 1/T sum_i A[T-1][i]. Source: GEM, arXiv:1706.08840, ACC."""
    return _mean(last(scores))


def finetune(scores: Matrix) -> float:
    """Mean finetune accuracy (MFT), each task when it was just learnt: 1/T sum_i A[i][i]."""
    return _mean([scores[i][i] for i in range(len(scores))])


def mean_average(scores: Matrix) -> float:
    """Mean average accuracy (MAA) over the run: 1/T sum_t 1/(t+1) sum_{i<=t} A[t][i].

    Papers print this or `average` under the heading "Avg": say which.
    """
    return _mean([_mean(scores[t][: t + 1]) for t in range(len(scores))])


def backward_transfer(scores: Matrix) -> float:
    """What later tasks changed: 1/(T-1) sum_{i<T-1} (A[T-1][i] - A[i][i]), negative for forgetting.

    Source: GEM, arXiv:1706.08840, BWT. NaN with one task.
    """
    return _mean([scores[-1][i] - scores[i][i] for i in range(len(scores) - 1)])


def backward_transfer_over_all(scores: Matrix) -> float:
    """The same sum over T instead of T-1, as tables that count the last task's zero have it.

    Source: the tables of CoIN, arXiv:2403.08350. Equals `average - finetune`.
    """
    count = len(scores)
    return backward_transfer(scores) * (count - 1) / count if count > 1 else math.nan


def forgetting(scores: Matrix) -> float:
    """How far tasks are below their best: 1/(T-1) sum_{i<T-1} (max_{i<=t<T-1} A[t][i] - A[T-1][i]).

    Zero or more unless a task ends above every earlier score; the maximum begins when the task is
    learnt, not at its zero-shot score. Source: arXiv:1801.10112. NaN with one task.
    """
    count = len(scores)
    best = [_max([scores[t][i] for t in range(i, count - 1)]) for i in range(count - 1)]
    return _mean([best[i] - scores[-1][i] for i in range(count - 1)])


def forward_transfer(scores: Matrix, zero_shot: Sequence[float]) -> float:
    """What earlier tasks do for one not yet learnt: 1/(T-1) sum_{i>0} (A[i-1][i] - zero_shot[i]).

    `zero_shot[i]` is the score before any training. Source: GEM, arXiv:1706.08840, FWT, with the
    incoming model in the place of a random initialisation. NaN with one task, or when tasks are
    not scored before they are learnt.
    """
    return _mean([scores[i - 1][i] - zero_shot[i] for i in range(1, len(scores))])


def matrix(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[float]]:
    """Rows `{"after": name, "scores": {column: score}}` as nested lists; None or absent is NaN."""
    cells = [[row["scores"].get(column) for column in columns] for row in rows]
    return [[math.nan if cell is None else float(cell) for cell in line] for line in cells]


def summary(
    rows: Sequence[Mapping[str, Any]], retain: Sequence[str] = (), order: Sequence[str] = ()
) -> dict[str, float | None]:
    """The derived numbers of a run, finished or not, over the tasks learnt so far.

    `order` names all tasks; where some that were learnt have no row of their own (joint training
    learns all at once) only the average is defined, over all of them.

    `rows` are in the order of learning; a first row "zero-shot" is the model before any training.
    `retain` names columns that are never learnt: their mean, and its change since the first row,
    are told apart. None where undefined. Raises ValueError when two rows have the same name.
    """
    after = [row["after"] for row in rows]
    if len(set(after)) < len(after) or ZERO_SHOT in after[1:]:
        raise ValueError(
            f"found the rows {after}, expected each task once and {ZERO_SHOT!r} first or not at all"
        )
    tasks = [name for name in after if name != ZERO_SHOT]
    results: dict[str, float] = {}
    learnt = list(order[: order.index(tasks[-1]) + 1]) if order and tasks else tasks
    if tasks != learnt:
        results = {"average": _mean(matrix(rows[-1:], learnt)[0])}
    elif tasks:
        scores = matrix([row for row in rows if row["after"] != ZERO_SHOT], tasks)
        zero_shot = matrix(rows[:1], tasks)[0] if after[0] == ZERO_SHOT else [math.nan] * len(tasks)
        results = {
            "average": average(scores),
            "finetune": finetune(scores),
            "mean_average": mean_average(scores),
            "backward_transfer": backward_transfer(scores),
            "backward_transfer_over_all": backward_transfer_over_all(scores),
            "forgetting": forgetting(scores),
            "forward_transfer": forward_transfer(scores, zero_shot),
        }
    if rows and retain:
        kept = [_mean(line) for line in matrix(rows, retain)]
        results |= {"retain_average": kept[-1], "retain_change": kept[-1] - kept[0]}
    return {name: None if math.isnan(value) else value for name, value in results.items()}


def table(
    tasks: Sequence[str], retain: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `scores.json` holds: the names of the columns, the rows, and the summary."""
    return {
        "tasks": list(tasks),
        "retain": list(retain),
        "rows": list(rows),
        "summary": summary(rows, retain, tasks),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _max(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
