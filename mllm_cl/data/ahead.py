"""Samples that threads open and prepare while the device works on those before them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

THREADS = min(8, os.cpu_count() or 1)  # ours; Pillow and torch let go of the interpreter's lock


def ahead(make: Callable[[Item], Made], items: Iterable[Item], number: int) -> Iterator[Made]:
    """make(item) of every item, in their order, up to `number` of them before they are asked for.

    What `make` raises is raised where its result is asked for; then nothing more is made.
    """
    waiting = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
