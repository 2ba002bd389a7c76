r"""Statistics of scores that vary over seeds and over held-out questions at once. Pure functions of numpy arrays.

Runs of one study share their held-out questions, and arms share their seeds. The scores of an arm, or the paired differences
of two, are therefore a table ``(seeds, questions)`` with the crossed random effects

.. math:: d_{sq} = \delta + u_s + v_q + w_{sq}

and the mean of the table misses :math:`\delta` by the variance :math:`\sigma_u^2/S + \sigma_v^2/Q + \sigma_w^2/(SQ)`.
:func:`two_way` estimates it from the mean squares of the table (the two-way clustered variance, Cameron, Gelbach and Miller
2011) with degrees of freedom after Satterthwaite (1946). :func:`pigeonhole` is the bootstrap of both at once (Owen 2007).
`python -m pgpo_lightning.studies.simulation` measures how often either covers the truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
"""Scores of shape ``(seeds, questions)``, or ``(seeds, 1)`` for what has no questions."""

Answer = Literal["yes", "no", "not resolved"]
"""Whether information helps beyond its dose."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and questions, with what is known of its error.

    Attributes:
        value: The mean.
        seed_variance: Variance of the mean over seeds, for these questions; NaN for a single seed.
        question_variance: Variance of the mean over questions, for these seeds.
        cell_variance: The part that is in both, which counts once.
        seeds: Number of seeds.
        questions: Number of questions.
    """

    value: float
    seed_variance: float
    question_variance: float
    cell_variance: float
    seeds: int
    questions: int

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single seed."""
        # No component is negative, so no sum of them is less than what the cells alone bring.
        return math.sqrt(max(self.seed_variance + (self.question_variance - self.cell_variance), self.cell_variance))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error (Satterthwaite 1946), at least those of the smaller side."""
        rows, columns = self.seeds - 1, self.questions - 1
        if not columns:
            return rows
        spread = self.seed_variance**2 / rows + self.question_variance**2 / columns
        spread += self.cell_variance**2 / (rows * columns)
        return max(min(rows, columns), self.error**4 / spread) if spread > 0 else min(rows, columns)

    @property
    def deviation(self) -> float:
        """Standard deviation between seeds of the mean over these questions."""
        return math.sqrt(self.seed_variance * self.seeds)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval that covers the truth with probability `level`; NaN for a single seed."""
        if self.seeds < 2:
            return math.nan, math.nan
        half = quantile_t(1 - level, self.freedom) * self.error
        return self.value - half, self.value + half

    def p(self) -> float:
        """Return the probability of a mean this far from zero if the truth is zero; NaN for a single seed."""
        if self.seeds < 2:
            return math.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return tail_t(abs(self.value) / self.error, self.freedom)

    def with_seeds(self, seeds: int) -> "Mean":
        """Return what to expect of another number of seeds with the same questions."""
        less = self.seeds / seeds
        return replace(
            self,
            seed_variance=self.seed_variance * less,
            question_variance=self.question_variance - self.cell_variance * (1 - less),
            cell_variance=self.cell_variance * less,
            seeds=seeds,
        )


def two_way(tables: Sequence[Table]) -> Mean:
    """Average over seeds and questions; the mean of several studies if there are several tables.

    Tables with equally many questions are averaged cell by cell, which is right whether or not the questions are the same;
    otherwise the questions of different studies are taken as independent. What questions add to the variance is never taken as
    negative.

    Args:
        tables: Each ``(seeds, questions)``, with the same seeds in the same order.

    Example:
        >>> mean = two_way([np.array([[0.0, 1.0], [0.5, 1.0], [0.5, 0.5]])])
        >>> round(mean.value, 3), round(mean.error, 3)
        (0.583, 0.22)
    """
    if len({table.shape for table in tables}) == 1:
        tables = [np.mean(tables, axis=0)]
    by_seed = np.mean([table.mean(axis=1) for table in tables], axis=0)  # (seeds,)
    seeds = len(by_seed)
    value = float(by_seed.mean())
    if seeds < 2:
        return Mean(value, math.nan, math.nan, math.nan, seeds, tables[0].shape[1])
    by_question = cell = 0.0
    for table in tables:
        questions = table.shape[1]
        if questions > 1:
            columns = table.mean(axis=0)  # (questions,)
            residual = table - table.mean(axis=1, keepdims=True) - columns + table.mean()
            by_question += columns.var(ddof=1) / questions / len(tables) ** 2
            cell += (residual**2).sum() / ((seeds - 1) * (questions - 1)) / table.size / len(tables) ** 2
    return Mean(
        value=value,
        seed_variance=float(by_seed.var(ddof=1)) / seeds,
        question_variance=max(by_question, cell),
        cell_variance=cell,
        seeds=seeds,
        questions=max(table.shape[1] for table in tables),
    )


def pigeonhole(table: Table, draws: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean over seeds and questions, both drawn anew (Owen 2007).

    The same `seed` draws the same questions and seeds for every table of one shape: arms are compared on common draws. It is
    given beside :meth:`Mean.interval` and not instead: of ten seeds it covers too little where single seeds collapse.

    Args:
        table: ``(seeds, questions)``.
        draws: Number of resamples.
        seed: Of the resamples.
        level: Of the interval.
    """
    seeds, questions = table.shape
    if seeds < 2:
        return math.nan, math.nan
    of_seeds, of_questions = _draws(seeds, questions, draws, seed)
    means = ((of_seeds @ table) * of_questions).sum(axis=1) / table.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _draws(seeds: int, questions: int, draws: int, seed: int) -> tuple[Table, Table]:
    """Return how often each resample holds each seed, ``(draws, seeds)``, and question, ``(draws, questions)``."""
    rng = np.random.default_rng(seed)
    of_questions = rng.multinomial(questions, np.full(questions, 1 / questions), draws).astype(float)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws).astype(float), of_questions


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979); NaN stays and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [math.nan] * len(p)
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def share(count: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), also for none and for all.

    Example:
        >>> low, high = share(0, 10)
        >>> round(low, 2), round(high, 2)
        (0.0, 0.28)
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, spread = count + z * z / 2, z * math.sqrt(count * (of - count) / of + z * z / 4)
    return max(0.0, (centre - spread) / (of + z * z)), min(1.0, (centre + spread) / (of + z * z))


def exact_share(count: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a share (Clopper and Pearson 1934): never too short, whatever the share.

    Example:
        >>> low, high = exact_share(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.308)
    """
    tail = (1 - level) / 2

    def below(p: float) -> bool:  # so many or more are too unlikely
        return _incomplete_beta(count, of - count + 1, p) < tail

    def above(p: float) -> bool:  # so few or fewer are not yet too unlikely
        return _incomplete_beta(count + 1, of - count, p) < 1 - tail

    return (_last(below) if count else 0.0), (_last(above) if count < of else 1.0)


def _last(holds: Callable[[float], bool]) -> float:
    """Return the end of the part of (0, 1), from its left, in which something holds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def answer(low: float, high: float, margin: float) -> Answer:
    """Answer whether something helps, from the interval of what it adds.

    `yes` if the interval lies above 0. `no` if it lies below `margin`: then a gain that matters is excluded, whether the
    interval is narrow around 0 or wholly below it. An interval with neither 0 nor `margin` inside is a `yes`: small, but there.

    Args:
        low: Lower end of the interval, corrected for the number of questions asked.
        high: Upper end.
        margin: The smallest gain that matters.
    """
    if low > 0:
        return "yes"
    return "no" if high < margin else "not resolved"


def seeds_for(mean: Mean, distance: float, level: float = 0.95, power: float = 0.8) -> int | None:
    """Return how many seeds it takes until an interval, `distance` away from a value, excludes it with probability `power`.

    The spread is the one that was seen, and so are the questions.

    Args:
        mean: Of the paired differences.
        distance: Of the true mean from the value to exclude.
        level: Of the interval.
        power: Probability that it excludes the value.

    Returns:
        The number; None if the spread between questions alone is too large for any number of seeds.
    """

    def enough(seeds: int) -> bool:
        planned = mean.with_seeds(seeds)
        reach = quantile_t(1 - level, planned.freedom) + quantile_t(2 * (1 - power), planned.freedom)
        return reach * planned.error <= distance

    high = 2
    while not enough(high):
        high *= 2
        if high > 2**20:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def questions_for(mean: Mean, distance: float, level: float = 0.95, power: float = 0.8) -> int:
    """Return how many held-out questions :func:`seeds_for` needs at least, with any number of seeds."""
    normal = NormalDist()
    reach = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return math.ceil(mean.questions * (mean.question_variance - mean.cell_variance) * (reach / distance) ** 2)


@lru_cache(maxsize=4096)
def tail_t(t: float, freedom: float) -> float:
    """Return the probability that Student's t is farther from 0 than `t`, on both sides together.

    Example:
        >>> round(tail_t(2.262157, 9), 4)
        0.05
    """
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) if t else 1.0


@lru_cache(maxsize=4096)
def quantile_t(p: float, freedom: float) -> float:
    """Return the t that Student's t exceeds in size with probability `p`: the inverse of :func:`tail_t`.

    Example:
        >>> round(quantile_t(0.05, 9), 4)
        2.2622
    """
    # The tail is convex, and the normal quantile lies left of the root: Newton's steps come from the left and never pass it.
    t = NormalDist().inv_cdf(1 - p / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    for _ in range(100):
        step = (tail_t(t, freedom) - p) / (2 * scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2))
        t += step
        if abs(step) < 1e-10 * t:
            break
    return t


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # Lentz's method: ratios of successive numerators and denominators.
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = lower
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            lower, upper = 1 / (1 + term * lower), 1 + term / upper
            change = lower * upper
            fraction *= change
        if abs(change - 1) < 1e-13:
            break
    return math.exp(log_front) * fraction / a
