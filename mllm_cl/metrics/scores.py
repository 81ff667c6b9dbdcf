"""The matrices of a continual run, and the numbers that are derived from them.

`A[t][i]` is the score on task i after task t, both counted from 0 and in the order of learning, and
`L[t][i]` the loss there: the mean negative log-likelihood per answer token of its evaluation data.
T tasks have been learnt. What was not evaluated is NaN, and so is every result that needs it:
nothing is averaged over a hole.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]
ZERO_SHOT = "zero-shot"  # the row before any training
MATCHES = ("exact_match", "normalised_match")  # of a row, beside "scores": see metrics/answers.py
LOSSES = "losses"
CONSTANT = "constant"  # of a row: what a score has to beat, see `most_common`


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


def objective(losses: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """What continual learning minimises after task t: sum_{i<=t} lambda_i L[t][i], lower is better.

    `losses` are those of the tasks learnt so far, L[t][0] to L[t][t], `weights` the lambda_i, by
    default 1 / (t+1) each, which makes this the mean loss. Raises ValueError where their numbers
    differ.
    """
    weights = [1 / len(losses)] * len(losses) if weights is None else weights
    if len(weights) != len(losses):
        raise ValueError(f"found {len(weights)} weights for the losses of {len(losses)} tasks")
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def revision(rows: Sequence[Mapping[str, Any]], replaced: Mapping[str, str]) -> dict[str, float]:
    """What became of answers that changed, as means over the revisions of `replaced`: old -> new.

    adoption:              the last score on the new task, 1 for answers that are all the new ones.
    stale_answers:         the last score on the old task, whose questions are the same and whose
                           expected answers are the old ones: the share still given.
    collateral_forgetting: what all other learnt tasks lost while the new answers were learnt,
                           mean_i (A[n-1][i] - A[n][i]) with n the row of the new task.
    """
    after = [row["after"] for row in rows]
    done = {old: new for old, new in replaced.items() if {old, new} <= set(after)}
    if not done:
        return {}
    last, lost = rows[-1]["scores"], []
    for old, new in done.items():
        n = after.index(new)
        others = [name for name in after[:n] if name not in (ZERO_SHOT, old)]
        ends = matrix(rows[n - 1 : n + 1], others)
        lost += [then - now for then, now in zip(*ends, strict=True)]
    return {
        "adoption": _mean([last[new] for new in done.values()]),
        "stale_answers": _mean([last[old] for old in done]),
        "collateral_forgetting": _mean(lost),
    }


def matrix(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], key: str = "scores"
) -> list[list[float]]:
    """Rows `{"after": name, key: {column: number}}` as nested lists; None or absent is NaN."""
    cells = [[row.get(key, {}).get(column) for column in columns] for row in rows]
    return [[math.nan if cell is None else float(cell) for cell in line] for line in cells]


def summary(
    rows: Sequence[Mapping[str, Any]],
    retain: Sequence[str] = (),
    order: Sequence[str] = (),
    replaced: Mapping[str, str] | None = None,
) -> dict[str, float | None]:
    """The derived numbers of a run, finished or not, over the tasks learnt so far.

    A task that another has replaced (`replaced`: old -> new) counts until then; afterwards a high
    score on it is no merit, and only `revision` tells it.

    `order` names all tasks; where some that were learnt have no row of their own (joint training
    learns all at once) only the average is defined, over all of them.

    `rows` are in the order of learning; a first row "zero-shot" is the model before any training.
    `retain` names columns that are never learnt: their mean, and its change since the first row,
    are told apart. Rows that hold `MATCHES` and `LOSSES` also give average and forgetting by those
    metrics in place of each task's own, and the objective. None where undefined. Raises ValueError
    when two rows have the same name.
    """
    after = [row["after"] for row in rows]
    if len(set(after)) < len(after) or ZERO_SHOT in after[1:]:
        raise ValueError(
            f"found the rows {after}, expected each task once and {ZERO_SHOT!r} first or not at all"
        )
    told = revision(rows, replaced or {})
    if told:
        gone = [old for old, new in (replaced or {}).items() if new in after]
        rows = [row for row in rows if row["after"] not in gone]
        order = [name for name in order if name not in gone]
    tasks = [row["after"] for row in rows if row["after"] != ZERO_SHOT]
    learnt = list(order[: order.index(tasks[-1]) + 1]) if order and tasks else tasks
    results: dict[str, float] = {}
    if tasks:
        results = (
            _by_metric(rows, learnt) if tasks == learnt else _by_metric_at_the_end(rows, learnt)
        )
    if tasks and LOSSES in rows[-1]:
        results["objective"] = objective(matrix(rows[-1:], learnt, LOSSES)[0])
    if rows and retain:
        kept = [_mean(line) for line in matrix(rows, retain)]
        results |= {"retain_average": kept[-1], "retain_change": kept[-1] - kept[0]}
    return {name: None if math.isnan(value) else value for name, value in (results | told).items()}


def _by_metric(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """What follows from the matrix of scores, and average and forgetting of the other metrics."""
    before = [
        line
        for row, line in zip(rows, matrix(rows, tasks), strict=True)
        if row["after"] == ZERO_SHOT
    ]
    trained = [row for row in rows if row["after"] != ZERO_SHOT]
    scores = matrix(trained, tasks)
    results = {
        "average": average(scores),
        "finetune": finetune(scores),
        "mean_average": mean_average(scores),
        "backward_transfer": backward_transfer(scores),
        "backward_transfer_over_all": backward_transfer_over_all(scores),
        "forgetting": forgetting(scores),
        "forward_transfer": forward_transfer(
            scores, before[0] if before else [math.nan] * len(tasks)
        ),
    }
    for key in (key for key in MATCHES if key in rows[-1]):
        matches = matrix(trained, tasks, key)
        results |= {f"{key}_average": average(matches), f"{key}_forgetting": forgetting(matches)}
    return results


def _by_metric_at_the_end(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> dict[str, float]:
    """The averages alone, of tasks that were not learnt one after another."""
    results = {"average": _mean(matrix(rows[-1:], tasks)[0])}
    for key in (key for key in MATCHES if key in rows[-1]):
        results[f"{key}_average"] = _mean(matrix(rows[-1:], tasks, key)[0])
    return results


def table(
    tasks: Sequence[str],
    retain: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    replaced: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `scores.json` holds: the names of the columns, the rows, what one constant answer scores
    on each task, and the summary.
    """
    return {
        "tasks": list(tasks),
        "retain": list(retain),
        "rows": list(rows),
        CONSTANT: {name: value for row in rows for name, value in row.get(CONSTANT, {}).items()},
        "summary": summary(rows, retain, tasks, replaced),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _max(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
