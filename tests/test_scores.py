"""The numbers derived from a score matrix, against a matrix worked out by hand."""

import json
import math

import pytest

from mllm_cl.metrics import scores as s
from mllm_cl.metrics.answers import exact_match, metric, normalised_match

NAN = math.nan
# rows: after task 0, 1, 2
A = [[0.8, 0.3, 0.1], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]]
ZERO = [0.0, 0.1, 0.3]


def test_the_derived_numbers_of_a_matrix_worked_by_hand():
    assert s.last(A) == [0.5, 0.6, 0.9]
    assert s.average(A) == pytest.approx(2.0 / 3)
    assert s.finetune(A) == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert s.mean_average(A) == pytest.approx((0.8 + 0.8 + 2.0 / 3) / 3)
    assert s.backward_transfer(A) == pytest.approx((-0.3 - 0.1) / 2)
    assert s.backward_transfer_over_all(A) == pytest.approx(-0.4 / 3)
    assert s.forgetting(A) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert s.forward_transfer(A, ZERO) == pytest.approx(((0.3 - 0.1) + (0.2 - 0.3)) / 2)


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


def test_a_summary_of_an_unfinished_run_counts_the_tasks_learnt_so_far():
    assert s.summary(rows(2))["average"] == pytest.approx(0.8)
    assert s.summary(rows(2))["forgetting"] == pytest.approx(-0.1)
    assert s.summary(rows(0), ["base"]) == {"retain_average": 0.9, "retain_change": 0.0}
    assert s.summary([]) == {}


def test_a_table_is_strict_json_and_undefined_is_null():
    table = s.table(["a", "b", "c"], ["base"], rows(1))
    text = json.dumps(table, allow_nan=False)
    assert json.loads(text)["summary"]["forgetting"] is None
    assert list(table) == ["tasks", "retain", "rows", "summary"]


def test_a_row_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="each task once"):
        s.summary([*rows(), rows()[1]])


def test_exact_match_counts_equal_answers_and_nothing_else():
    assert exact_match(["red", "Red", "red."], ["red", "red", "red"]) == pytest.approx(1 / 3)


def test_normalised_match_forgives_case_spaces_and_the_final_stop():
    forgiven = {"Red": "red", " red ": "red", "red.": "red", "a  b!": "A b", "red ?": "red"}
    wrong = {"re.d": "red", "redd": "red", "rede": "red", "red,": "red", ".red": "red"}
    assert normalised_match(list(forgiven), list(forgiven.values())) == 1.0
    assert normalised_match(list(wrong), list(wrong.values())) == 0.0


@pytest.mark.parametrize("pair", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_scores_of_nothing_or_of_unequal_lists_are_refused(pair):
    for name in ("exact_match", "normalised_match"):
        with pytest.raises(ValueError, match="expected one each"):
            metric(name)(*pair)


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'exact_match'"):
        metric("exact_mach")
