"""Simulated studies."""

import math

STUDIES = 500


def noise(rate, n=STUDIES):
    """Three standard errors of a fraction."""
    return 3 * math.sqrt(rate * (1 - rate) / n)


def tables(rng, seeds, questions=100, mean=0.0, of_seed=0.03, of_question=0.08, of_cell=0.2, n=STUDIES):
    """Paired differences with crossed effects, each table of shape (seeds, questions)."""
    shape = (n, seeds, questions)
    effects = rng.normal(0, of_seed, shape[:2])[:, :, None] + rng.normal(0, of_question, (n, 1, questions))
    return mean + effects + rng.normal(0, of_cell, shape)
