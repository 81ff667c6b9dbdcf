"""The mean over seeds, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
_T += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval, NaN for fewer than three."""

    mean: float
    half: float
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> Interval | None:
    """mean +- t_{0.975, n-1} s / sqrt(n), s the standard deviation over n - 1; None of nothing.

    Two values would have an interval of nine deviations to each side: they get none.
    """
    if not values:
        return None
    number, mean = len(values), math.fsum(values) / len(values)
    if number < 3:
        return Interval(mean, math.nan, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1))
    freedom = number - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.46 / freedom
    return Interval(mean, t * deviation / math.sqrt(number), tuple(values))
