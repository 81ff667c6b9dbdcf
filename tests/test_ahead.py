"""Threads that open pictures ahead: the order stays, and an error comes where it belongs."""

import threading
import time

import pytest

from mllm_cl.data.ahead import ahead


def test_items_come_in_their_order_however_long_each_takes():
    def made(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(ahead(made, range(20), 4)) == [item * item for item in range(20)]
    assert list(ahead(made, [], 4)) == []


def test_no_more_than_so_many_are_made_before_they_are_asked_for():
    begun = []
    found = ahead(begun.append, range(100), 5)
    next(found)
    found.close()
    assert len(begun) <= 6


def test_they_are_made_while_others_are_worked_on():
    made, second = [], threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 1:
            second.set()
        return item

    for item in ahead(make, [0, 1], 1):
        assert item != 0 or second.wait(10), "the second waits for the first"
    assert made == [0, 1]


def test_an_error_is_raised_where_its_item_is_asked_for():
    def made(item: int) -> int:
        if item == 3:
            raise ValueError("the fourth cannot be read")
        return item

    found, seen = ahead(made, range(1000), 4), []
    with pytest.raises(ValueError, match="the fourth"):
        seen.extend(iter(found.__next__, None))
    assert seen == [0, 1, 2]
