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
`scipy.stats.false_discovery_control` controls another error rate) and no equivalence test (:meth:`Mean.p_within`). statsmodels
has the last two, and fits crossed effects by likelihood, with normal intervals; the tests compare ours with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import binomtest

Table = NDArray[np.float64]
"""Scores of shape ``(seeds, questions)``, or ``(seeds, 1)`` for quantities without questions."""


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
        half = -float(stdtrit(self.freedom, (1 - level) / 2)) * self.error
        return self.value - half, self.value + half

    def p(self) -> float:
        """Return the two-sided p-value of the hypothesis that the true value is 0; NaN for a single seed."""
        if self.seeds < 2:
            return math.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error))

    def p_above(self, threshold: float = 0.0) -> float:
        """Return the one-sided p-value of the hypothesis that the true value is not above a threshold.

        NaN without a variance to judge by: for a single seed and for runs that agree exactly.
        """
        if self.seeds < 2 or self.error == 0:
            return math.nan
        return float(stdtr(self.freedom, (threshold - self.value) / self.error))

    def p_below(self, threshold: float) -> float:
        """Return the one-sided p-value of the hypothesis that the true value is not below a threshold; NaN likewise."""
        return 1 - self.p_above(threshold)

    def p_within(self, margin: float) -> float:
        """Return the p-value of equivalence: of the two one-sided tests against `-margin` and `margin` (Schuirmann 1987)."""
        # Not `max`, which would drop a NaN in second place.
        return float(np.maximum(self.p_above(-margin), self.p_below(margin)))

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


def two_way(table: Table) -> Mean:
    """Average over seeds and questions. The variance that questions add is never estimated as negative.

    Args:
        table: ``(seeds, questions)``.

    Example:
        >>> mean = two_way(np.array([[0.0, 1.0], [0.5, 1.0], [0.5, 0.5]]))
        >>> round(mean.value, 3), round(mean.error, 3)
        (0.583, 0.22)
    """
    seeds, questions = table.shape
    value = float(table.mean())
    if seeds < 2:
        return Mean(value, math.nan, math.nan, math.nan, seeds, questions)
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    by_question = cell = 0.0
    if questions > 1:
        residual = table - rows[:, None] - columns + value
        by_question = float(columns.var(ddof=1)) / questions
        cell = float((residual**2).sum()) / ((seeds - 1) * (questions - 1)) / table.size
    return Mean(
        value=value,
        seed_variance=float(rows.var(ddof=1)) / seeds,
        question_variance=max(by_question, cell),
        cell_variance=cell,
        seeds=seeds,
        questions=questions,
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


def exact_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson 1934), whose coverage is never below `level`.

    Example:
        >>> low, high = exact_interval(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.308)
    """
    interval = binomtest(count, total).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)
