"""Simulated studies."""

import math

STUDIES = 500


def noise(rate, n=STUDIES):
    """Three standard errors of a fraction."""
    return 3 * math.sqrt(rate * (1 - rate) / n)
