"""The order of a weak approximation, from its errors at several step sizes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

FLOOR = 1e-11
"""Errors below are rounding, and have no order."""


class Order(NamedTuple):
    """Slope of log |error| over log eta.

    Attributes:
        value: By least squares; NaN if an error is zero up to rounding.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the slope with its interval."""
        return "exact" if math.isnan(self.value) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def fit_order(etas: Sequence[float], errors: Sequence[float]) -> Order:
    """Fit ``|error| = C eta^order``.

    The errors are exact, so the interval (Student's t) holds no sampling error: it is how far higher orders bend the line.

    Args:
        etas: At least three different step sizes.
        errors: One each.

    Example:
        >>> print(fit_order([0.1, 0.2, 0.4], [1.0, 4.0, 16.0]))
        2.00 [2.00, 2.00]
    """
    if min(map(abs, errors)) < FLOOR:
        return Order(math.nan, math.nan, math.nan)
    x, y = np.log(etas), np.log(np.abs(errors))
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    half = float(student_t.isf(0.025, len(x) - 2)) * math.sqrt(residual @ residual / (len(x) - 2) / (x @ x))
    return Order(slope, slope - half, slope + half)
