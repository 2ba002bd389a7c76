r"""Inference for scores that vary over seeds and over held-out questions at once. Pure functions of numpy arrays.

Runs of one study share their held-out questions, and arms share their seeds. The scores of an arm, or the paired differences
between two arms, are therefore a table ``(seeds, questions)`` with crossed random effects:

.. math:: d_{sq} = \delta + u_s + v_q + w_{sq}

The mean of the table estimates :math:`\delta` with variance :math:`\sigma_u^2/S + \sigma_v^2/Q + \sigma_w^2/(SQ)`.
:func:`two_way` estimates this variance from the mean squares of the table (two-way clustered variance, Cameron, Gelbach and
Miller 2011), with degrees of freedom after Satterthwaite (1946). :func:`pigeonhole` is the bootstrap over seeds and questions
at once (Owen 2007). ``python -m benchmarks.study_simulation`` measures how often either interval covers the true value.

Student's t and binomial intervals are SciPy's. SciPy has no inference for crossed random effects (:func:`two_way`,
:func:`pigeonhole`; `scipy.stats.bootstrap` resamples one axis), no Holm correction (:func:`holm`;
`scipy.stats.false_discovery_control` controls another error rate) and no equivalence test (:func:`answer`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

Table = NDArray[np.float64]
"""Scores of shape ``(seeds, questions)``, or ``(seeds, 1)`` for quantities without questions."""

Answer = Literal["yes", "no", "not resolved"]
"""Whether information helps beyond its dose."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and questions, with its variance components.

    Attributes:
        value: The mean.
        seed_variance: Variance of the mean over seeds, for these questions; NaN for a single seed.
        question_variance: Variance of the mean over questions, for these seeds.
        cell_variance: The part that both of them contain; it counts once.
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
        # No component is negative, so the sum cannot be below what the cells alone contribute.
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
        """Return the interval that covers the true value with probability `level`; NaN for a single seed."""
        if self.seeds < 2:
            return math.nan, math.nan
        half = float(student_t.isf((1 - level) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p(self) -> float:
        """Return the two-sided p-value of the hypothesis that the true value is 0; NaN for a single seed."""
        if self.seeds < 2:
            return math.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * student_t.sf(abs(self.value) / self.error, self.freedom))

    def with_seeds(self, seeds: int) -> "Mean":
        """Return the expected result with another number of seeds and the same questions."""
        ratio = self.seeds / seeds
        return replace(
            self,
            seed_variance=self.seed_variance * ratio,
            question_variance=self.question_variance - self.cell_variance * (1 - ratio),
            cell_variance=self.cell_variance * ratio,
            seeds=seeds,
        )


def two_way(tables: Sequence[Table]) -> Mean:
    """Average over seeds and questions. With several tables, return the mean over their conditions.

    Tables with equally many questions are averaged cell by cell, which is correct whether or not the questions are the same.
    Otherwise the questions of different conditions are treated as independent. The variance that questions add is never
    estimated as negative.

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
    """Return the bootstrap percentile interval of the mean, resampling seeds and questions independently (Owen 2007).

    The same `seed` draws the same questions and seeds for every table of one shape, so arms are compared on common draws. The
    interval supplements :meth:`Mean.interval` and does not replace it: with ten seeds its coverage is too low where single
    runs collapse.

    Args:
        table: ``(seeds, questions)``.
        draws: Number of resamples.
        seed: Of the resamples.
        level: Of the interval.
    """
    seeds, questions = table.shape
    if seeds < 2:
        return math.nan, math.nan
    seed_counts, question_counts = _draws(seeds, questions, draws, seed)
    means = ((seed_counts @ table) * question_counts).sum(axis=1) / table.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _draws(seeds: int, questions: int, draws: int, seed: int) -> tuple[Table, Table]:
    """Return how often each resample contains each seed, ``(draws, seeds)``, and each question, ``(draws, questions)``."""
    rng = np.random.default_rng(seed)
    question_counts = rng.multinomial(questions, np.full(questions, 1 / questions), draws).astype(float)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws).astype(float), question_counts


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons (Holm 1979), which SciPy does not offer. NaN stays NaN and is not counted.

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


def wilson_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a proportion (Wilson 1927), also for none and for all.

    Example:
        >>> low, high = wilson_interval(0, 10)
        >>> round(low, 2), round(high, 2)
        (0.0, 0.28)
    """
    interval = binomtest(count, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def exact_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson 1934), whose coverage is never below `level`.

    Example:
        >>> low, high = exact_interval(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.308)
    """
    interval = binomtest(count, total).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def answer(low: float, high: float, margin: float) -> Answer:
    """Answer whether information helps, from the interval of the gain.

    `yes` if the interval is above 0. `no` if it is below `margin`: then a gain of interest is excluded, whether the interval
    is narrow around 0 or entirely below it. An interval above 0 and below `margin` is a `yes`: the gain is small but
    significant. This is not the two one-sided tests of equivalence: a loss, however large, is a `no`.

    Args:
        low: Lower end of the interval, corrected for the number of comparisons.
        high: Upper end.
        margin: The smallest gain of interest.
    """
    if low > 0:
        return "yes"
    return "no" if high < margin else "not resolved"


def seeds_for(mean: Mean, distance: float, level: float = 0.95, power: float = 0.8) -> int | None:
    """Return the number of seeds with which an interval excludes a value at `distance` from the true mean.

    Variances and questions are those observed.

    Args:
        mean: Of the paired differences.
        distance: Between the true mean and the value to exclude.
        level: Of the interval.
        power: Probability that the interval excludes the value.

    Returns:
        The number of seeds, or None if the variance between questions alone is too large for any number of seeds.
    """

    def enough(seeds: int) -> bool:
        planned = mean.with_seeds(seeds)
        reach = student_t.isf([(1 - level) / 2, 1 - power], planned.freedom).sum()
        return float(reach) * planned.error <= distance

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
    """Return the least number of held-out questions that :func:`seeds_for` needs with an unlimited number of seeds."""
    reach = float(norm.isf([(1 - level) / 2, 1 - power]).sum())
    return math.ceil(mean.questions * (mean.question_variance - mean.cell_variance) * (reach / distance) ** 2)
