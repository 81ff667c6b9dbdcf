"""Class orders and stages are those of the published tables."""

import numpy as np
import pytest

from mllm_cl.data.classes import class_order, stage_sizes, stages

# First entries of `numpy.random.seed(1993); numpy.random.permutation(C)`.
ORDERS = {
    50: "43 41 23 14 13 40 42 22 16 45 17 10",
    100: "68 56 78 8 23 84 90 65 74 76 40 89 3 92 55 9 26 80 43 38",
    200: "168 136 51 9 183 101 171 99 42 159 191 70 16 188 27 10 175 26 68 187",
    300: "169 221 146 296 92 229 49 70 126 77 243 57 120 223 27 217 154 8 101 182",
}


@pytest.mark.parametrize("number", ORDERS)
def test_seed_1993_gives_the_order_of_the_published_tables(number):
    begin = [int(word) for word in ORDERS[number].split()]
    order = class_order(number, 1993)
    assert list(order[: len(begin)]) == begin
    assert sorted(order) == list(range(number))


def test_drawing_an_order_leaves_the_global_random_state_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    class_order(100, 1993)
    assert np.random.rand() == expected


def test_without_a_seed_classes_keep_their_own_order():
    assert class_order(4, None) == (0, 1, 2, 3)
    assert stages("abcd", 0, 3, None) == [("a", "b", "c"), ("d",)]


@pytest.mark.parametrize(
    ("number", "first", "increment", "sizes"),
    [
        (100, 0, 10, (10,) * 10),
        (100, 50, 10, (50,) + (10,) * 5),
        (100, 20, 20, (20,) * 5),
        (300, 0, 30, (30,) * 10),
        (10, 0, 4, (4, 4, 2)),
        (10, 5, 4, (5, 4, 1)),
        (10, 4, 100, (4, 6)),
        (10, 10, 1, (10,)),
    ],
)
def test_stages_are_a_first_one_equal_ones_and_what_is_left(number, first, increment, sizes):
    assert stage_sizes(number, first, increment) == sizes


def test_stages_hold_every_class_once_in_the_class_order():
    names = [f"class {k}" for k in range(100)]
    found = stages(names, 50, 10, 1993)
    assert [len(stage) for stage in found] == [50, 10, 10, 10, 10, 10]
    assert found[0][:3] == ("class 68", "class 56", "class 78")
    assert [name for stage in found for name in stage] == [names[k] for k in class_order(100, 1993)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: stage_sizes(10, 0, 0), "increment is 0"),
        (lambda: stage_sizes(10, -1, 2), "first is -1"),
        (lambda: stage_sizes(10, 11, 2), "first is 11, but there are 10 classes"),
        (lambda: stage_sizes(10, 0, 20), "increment is 20, but there are 10 classes"),
        (lambda: class_order(0, 1993), "0 classes"),
        (lambda: class_order(10, -1), "seed is -1"),
        (lambda: stages(["cat", "dog", "cat"], 0, 1, None), "appear twice: cat"),
    ],
)
def test_a_split_that_cannot_be_is_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
