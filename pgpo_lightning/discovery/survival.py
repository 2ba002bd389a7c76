r"""discovery@k as one minus a survival function, for runs that end without a success. Pure functions of numpy arrays.

Discovery time T is the number of generations (or tokens, or seconds) until the first success. discovery@k = P(T <= k)
(arXiv 2601.20802, definition 5.1). A run without a success by the end of its budget says that T is larger, no more. The estimate
is Kaplan and Meier's (1958); where all runs have the same budget it is the share of runs with T <= k.

Runs share questions and seeds. Intervals are from a bootstrap that draws questions and seeds at once (Owen 2007,
:func:`pgpo_lightning.studies.inference.pigeonhole`): a run weighs as often as its question times as often as its seed was drawn.
statsmodels' ``SurvfuncRight`` takes such weights and has no second axis for many resamples; the tests compare with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Survival functions of one set of runs, one per row of weights.

    Attributes:
        times: Times of the runs, sorted, ``(runs,)``.
        survival: P(T > time) right after each of them, ``(draws, runs)``.
    """

    times: Array
    survival: Array

    def discovery(self, at: float | Array) -> Array:
        """Return P(T <= at), ``(draws,)`` or ``(draws, len(at))``. Behind the last time it stays as it is."""
        return 1 - self._padded()[:, np.searchsorted(self.times, at, side="right")]

    def restricted_mean(self, horizon: float) -> Array:
        """Return the mean of min(T, horizon), ``(draws,)``, in the unit of the times."""
        edges = np.concatenate([[0.0], np.minimum(self.times, horizon), [horizon]])
        return self._padded() @ np.diff(edges)

    def median(self) -> Array:
        """Return the first time by which half of the runs have a success, ``(draws,)``; infinite if there is none."""
        below = self.survival <= 0.5 + 1e-12
        first = below.argmax(axis=1)
        return np.where(below.any(axis=1), self.times[first], np.inf)

    def _padded(self) -> Array:
        return np.concatenate([np.ones((len(self.survival), 1)), self.survival], axis=1)


def kaplan_meier(times: Array, found: NDArray[np.bool_], weights: Array | None = None) -> Curve:
    """Return the survival function of discovery times.

    Args:
        times: Until the first success, or until the run ended without one, ``(runs,)``.
        found: Whether there was a success, ``(runs,)``.
        weights: How often each run counts, ``(draws, runs)``; null for once each.
    """
    weights = np.ones((1, len(times))) if weights is None else weights
    order = np.lexsort((~found, times))  # a success precedes the ends of runs at the same time
    counts = weights[:, order]
    at_risk = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    events = counts * found[order]
    # With one factor per run, those of equal times telescope to the usual one.
    factors = 1 - np.divide(events, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
    survival = factors.cumprod(axis=1)
    survival[at_risk[:, 0] == 0] = np.nan  # a resample without any of these runs
    return Curve(times[order], survival)


class Resamples:
    """Resamples of questions and seeds, the same for every method.

    Args:
        questions: Different questions.
        seeds: Different seeds.
        draws: Number of resamples.
        seed: Of the resamples.
    """

    def __init__(self, questions: Sequence[int], seeds: Sequence[int], draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._counts = [
            dict(zip(labels, _multinomial(rng, len(labels), draws), strict=True)) for labels in (questions, seeds)
        ]

    def weights(self, questions: Sequence[int], seeds: Sequence[int]) -> Array:
        """Return how often each run counts in each resample, ``(draws, runs)``.

        Args:
            questions: Question of each run.
            seeds: Seed of each run.
        """
        of_question, of_seed = self._counts
        return np.stack([of_question[q] * of_seed[s] for q, s in zip(questions, seeds, strict=True)], axis=1)


def _multinomial(rng: np.random.Generator, count: int, draws: int) -> Array:
    """Return how often each of `count` things is drawn, ``(count, draws)``."""
    return rng.multinomial(count, np.full(count, 1 / count), draws).T.astype(float)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of resampled values; NaN is left out."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
