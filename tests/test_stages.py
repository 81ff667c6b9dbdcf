"""Class-incremental metrics, on a matrix worked by hand: stages of 50, 10 and 10 images."""

import math

import pytest

from mllm_cl.metrics.stages import (
    average_incremental,
    old_and_new,
    performance_drop,
    stage_accuracies,
    summary,
)

NAN = math.nan
SCORES = [[0.9, NAN, NAN], [0.8, 0.6, NAN], [0.7, 0.4, 0.5]]
COUNTS = [50, 10, 10]


def test_a_stage_counts_by_its_images():
    # (40 + 6) / 60 and (35 + 4 + 5) / 70
    assert stage_accuracies(SCORES, COUNTS) == pytest.approx([0.9, 46 / 60, 44 / 70])


def test_the_average_is_over_stages_and_the_drop_from_first_to_last():
    assert average_incremental(SCORES, COUNTS) == pytest.approx((0.9 + 46 / 60 + 44 / 70) / 3)
    assert performance_drop(SCORES, COUNTS) == pytest.approx(0.9 - 44 / 70)


def test_old_new_and_their_harmonic_mean():
    first, second, third = old_and_new(SCORES, COUNTS)
    assert math.isnan(first[0]) and first[1] == 0.9 and math.isnan(first[2])
    assert second == pytest.approx((0.8, 0.6, 2 * 0.8 * 0.6 / 1.4))
    assert third == pytest.approx((39 / 60, 0.5, 2 * 0.65 * 0.5 / 1.15))


def test_nothing_right_has_a_harmonic_mean_of_zero():
    assert old_and_new([[0.0, NAN], [0.0, 0.0]], [1, 1])[1] == (0.0, 0.0, 0.0)


def test_no_stage_has_no_average():
    assert math.isnan(average_incremental([], []))


def test_the_summary_is_of_the_last_stage_and_leaves_the_incoming_model_out():
    names = ["1-50", "51-60", "61-70"]
    rows = [{"after": "zero-shot", "scores": {}, "counts": {}}]
    for name, line in zip(names, SCORES, strict=True):
        scores = {k: v for k, v in zip(names, line, strict=True) if not math.isnan(v)}
        rows.append(
            {"after": name, "scores": scores, "counts": dict(zip(names, COUNTS, strict=True))}
        )
    assert summary(rows) == pytest.approx(
        {
            "average_incremental": (0.9 + 46 / 60 + 44 / 70) / 3,
            "last": 44 / 70,
            "performance_drop": 0.9 - 44 / 70,
            "old": 0.65,
            "new": 0.5,
            "harmonic_mean": 2 * 0.65 * 0.5 / 1.15,
        }
    )
    assert summary(rows[:1]) == {}
    assert summary(rows[:2])["old"] is None
