"""The numbers derived from a score matrix, against a matrix worked out by hand."""

import json
import math

import pytest

from mllm_cl.metrics import scores as s

NAN = math.nan
# rows: after task 0, 1, 2
A = [[0.8, 0.3, 0.1], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]]
ZERO = [0.0, 0.1, 0.3]
L = [[0.5, 2.0, 3.0], [1.0, 0.25, 2.0], [1.5, 0.75, 0.5]]  # losses


def test_the_derived_numbers_of_a_matrix_worked_by_hand():
    assert s.last(A) == [0.5, 0.6, 0.9]
    assert s.average(A) == pytest.approx(2.0 / 3)
    assert s.finetune(A) == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert s.mean_average(A) == pytest.approx((0.8 + 0.8 + 2.0 / 3) / 3)
    assert s.backward_transfer(A) == pytest.approx((-0.3 - 0.1) / 2)
    assert s.backward_transfer_over_all(A) == pytest.approx(-0.4 / 3)
    assert s.forgetting(A) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert s.forward_transfer(A, ZERO) == pytest.approx(((0.3 - 0.1) + (0.2 - 0.3)) / 2)


def test_the_objective_is_the_weighted_sum_of_the_losses_on_what_was_learnt():
    assert s.objective(L[2]) == pytest.approx((1.5 + 0.75 + 0.5) / 3)
    assert s.objective(L[1][:2], [0.75, 0.25]) == pytest.approx(0.75 * 1.0 + 0.25 * 0.25)
    assert math.isnan(s.objective([1.0, NAN]))
    with pytest.raises(ValueError, match="2 weights for the losses of 3"):
        s.objective(L[2], [0.5, 0.5])


def test_backward_transfer_over_all_is_average_less_finetune():
    assert s.backward_transfer_over_all(A) == pytest.approx(s.average(A) - s.finetune(A))


def test_forgetting_counts_from_the_best_score_and_backward_transfer_from_the_first():
    rose_and_fell = [[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.5, 0.5, 0.5]]
    assert s.backward_transfer(rose_and_fell) == 0.0
    assert s.forgetting(rose_and_fell) == pytest.approx(0.2)


def test_what_is_not_evaluated_is_never_averaged_over():
    lower = [[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.5, 0.6, 0.9]]
    assert s.forgetting(lower) == s.forgetting(A) and s.mean_average(lower) == s.mean_average(A)
    assert math.isnan(s.forward_transfer(lower, ZERO))
    for hole in [(2, 0), (1, 1), (0, 0)]:
        holed = [list(row) for row in lower]
        holed[hole[0]][hole[1]] = NAN
        assert math.isnan(s.mean_average(holed))
    assert math.isnan(s.forgetting([[0.8, NAN, NAN], [NAN, 0.7, NAN], [0.5, 0.6, 0.9]]))


def test_one_task_has_an_average_but_nothing_to_forget():
    assert s.average([[0.8]]) == 0.8
    for measure in (s.backward_transfer, s.backward_transfer_over_all, s.forgetting):
        assert math.isnan(measure([[0.8]]))


def rows(stages=3):
    names = ["a", "b", "c"]
    start = {"after": "zero-shot", "scores": dict(zip(names, ZERO, strict=True)) | {"base": 0.9}}
    learnt = [
        {"after": name, "scores": dict(zip(names, line, strict=True)) | {"base": 0.8 - 0.1 * i}}
        for i, (name, line) in enumerate(zip(names, A, strict=True))
    ]
    return [start, *learnt][: stages + 1]


def test_a_summary_holds_every_number_and_sets_retained_data_apart():
    found = s.summary(rows(), ["base"])
    assert found["average"] == pytest.approx(s.average(A))
    assert found["forward_transfer"] == pytest.approx(s.forward_transfer(A, ZERO))
    assert found["retain_average"] == pytest.approx(0.6)
    assert found["retain_change"] == pytest.approx(-0.3)


def with_matches(rows):
    """The same rows with the matches and losses that a run writes."""
    strict = [[0.0, 0.1, 0.2], [0.6, 0.1, 0.2], [0.6, 0.6, 0.2], [0.2, 0.2, 0.8]]
    lenient = [[0.0, 0.1, 0.2], [0.8, 0.1, 0.2], [0.8, 0.8, 0.2], [0.8, 0.8, 0.8]]
    found = []
    for row, *lines in zip(rows, strict, lenient, [[9.0] * 3, *L], strict=False):
        keys = ("exact_match", "normalised_match", "losses")
        named = [dict(zip("abc", line, strict=True)) | {"base": 1.0} for line in lines]
        found.append(row | dict(zip(keys, named, strict=True)))
    return found


def test_a_summary_tells_forgetting_of_form_from_forgetting_of_knowledge():
    found = s.summary(with_matches(rows()), ["base"])
    assert found["exact_match_average"] == pytest.approx(0.4)
    assert found["exact_match_forgetting"] == pytest.approx(0.4)
    assert found["normalised_match_average"] == pytest.approx(0.8)
    assert found["normalised_match_forgetting"] == pytest.approx(0.0)
    assert found["objective"] == pytest.approx(s.objective(L[2]))
    assert found | s.summary(rows(), ["base"]) == found  # the other numbers are what they were


def test_a_summary_of_joint_training_has_averages_only():
    joint = [with_matches(rows())[0], with_matches(rows())[3]]
    found = s.summary(joint, order=["a", "b", "c"])
    assert list(found) == [
        "average",
        "exact_match_average",
        "normalised_match_average",
        "objective",
    ]
    assert found["objective"] == pytest.approx(s.objective(L[2]))


def test_losses_that_were_not_measured_leave_the_objective_undefined():
    holed = with_matches(rows())
    holed[-1]["losses"]["b"] = None
    assert s.summary(holed)["objective"] is None
    del holed[-1]["losses"]["b"]
    assert s.summary(holed)["objective"] is None
    assert s.summary(with_matches(rows(2)))["objective"] == pytest.approx((1.0 + 0.25) / 2)


def test_a_summary_of_an_unfinished_run_counts_the_tasks_learnt_so_far():
    assert s.summary(rows(2))["average"] == pytest.approx(0.8)
    assert s.summary(rows(2))["forgetting"] == pytest.approx(-0.1)
    assert s.summary(rows(0), ["base"]) == {"retain_average": 0.9, "retain_change": 0.0}
    assert s.summary([]) == {}


def test_a_table_is_strict_json_and_undefined_is_null():
    table = s.table(["a", "b", "c"], ["base"], rows(1))
    text = json.dumps(table, allow_nan=False)
    assert json.loads(text)["summary"]["forgetting"] is None
    assert list(table) == ["tasks", "retain", "rows", "constant", "summary"]


def test_a_row_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="each task once"):
        s.summary([*rows(), rows()[1]])


# --- answers that change --------------------------------------------------------------------------


def revised_rows() -> list[dict]:
    """dial, then bars, then dial with other answers; then arrow."""
    cells = {
        "zero-shot": (0.1, 0.0, 0.1, 0.0),
        "dial": (0.9, 0.1, 0.0, 0.0),
        "bars": (0.8, 0.7, 0.0, 0.0),
        "dial2": (0.2, 0.6, 0.75, 0.1),
        "arrow": (0.1, 0.5, 0.7, 0.8),
    }
    names = ("dial", "bars", "dial2", "arrow")
    return [
        {"after": after, "scores": dict(zip(names, row, strict=True))}
        for after, row in cells.items()
    ]


def test_a_revision_tells_adoption_stale_answers_and_what_the_others_lost():
    found = s.summary(
        revised_rows(), order=("dial", "bars", "dial2", "arrow"), replaced={"dial": "dial2"}
    )
    assert found["adoption"] == 0.7 and found["stale_answers"] == 0.1
    assert found["collateral_forgetting"] == pytest.approx(0.7 - 0.6)


def test_a_replaced_task_counts_until_it_is_replaced():
    order, replaced = ("dial", "bars", "dial2", "arrow"), {"dial": "dial2"}
    found = s.summary(revised_rows(), order=order, replaced=replaced)
    assert found["average"] == pytest.approx((0.5 + 0.7 + 0.8) / 3)
    assert found["forgetting"] == pytest.approx((0.2 + 0.05) / 2)
    before = s.summary(revised_rows()[:3], order=order, replaced=replaced)
    assert before["average"] == pytest.approx((0.8 + 0.7) / 2) and "adoption" not in before
