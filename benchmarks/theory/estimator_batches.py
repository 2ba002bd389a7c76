r"""How a batch's estimate spreads, and whether its standard error says so: batches drawn from a bank, question by question.

Siblings answer one question and are shown one demonstration, so they are alike. With values :math:`x_{qj} = \mu + b_q + w_{qj}`
the mean over Q questions of m siblings has the variance :math:`(\sigma_b^2 + \sigma_w^2/m)/Q`, while the usual error, made for
independent sequences, tends to :math:`(\sigma_b^2 + \sigma_w^2)/(Qm)`. Their ratio is the design effect (Kish 1965).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CELLS = 4_000_000  # numbers in memory at a time


@dataclass(frozen=True)
class Batches:
    """Many batches of one size.

    Attributes:
        questions: Per batch.
        sequences: With a teacher, mean per batch.
        values: Estimates of I (nats), ``(draws,)``.
        naive: Standard errors over sequences, as if those were independent, ``(draws,)``.
        clustered: Standard errors over questions, as logged, ``(draws,)``.
    """

    questions: int
    sequences: float
    values: Array
    naive: Array
    clustered: Array

    @property
    def spread(self) -> float:
        """Standard deviation of the estimate over batches."""
        return float(self.values.std(ddof=1))

    def calibration(self, errors: Array) -> float:
        """Return a standard error (root of its mean square) over the true spread: 1 is calibrated, below is overconfident."""
        return float(np.sqrt(np.nanmean(errors**2))) / self.spread

    def coverage(self, errors: Array, truth: float) -> float:
        """Return the share of batches whose value lies within 1.96 standard errors of the truth."""
        known = ~np.isnan(errors)  # a single sequence, or question, has no error
        return float(np.mean((np.abs(self.values - truth) <= 1.96 * errors)[known]))


def arranged(values: Array, question: NDArray[np.int64], questions: int) -> Array:
    """Return values as a table ``(questions, most siblings)``, NaN where there is none.

    Args:
        values: One per sequence, ``(N,)``.
        question: Which question each belongs to, ``(N,)``, from 0.
        questions: Number of questions.
    """
    place = np.zeros(len(values), dtype=int)
    count = np.zeros(questions, dtype=int)
    for i, q in enumerate(question):
        place[i] = count[q]
        count[q] += 1
    table = np.full((questions, max(1, count.max())), np.nan)
    table[question, place] = values
    return table


def draw_batches(table: Array, questions: int, draws: int, seed: int, siblings: int | None = None) -> Batches:
    """Draw batches of whole questions from a bank, with replacement.

    Value and clustered error are those of :func:`pgpo_lightning.losses.information.information` (sequence-mean).

    Args:
        table: From :func:`arranged`.
        questions: Per batch.
        draws: Number of batches.
        seed: Seed of the draws.
        siblings: Only so many sequences of each question, drawn without replacement; None for all.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, draws, at_once := max(1, _CELLS // (questions * table.shape[1]))):
        picked = table[rng.integers(len(table), size=(min(at_once, draws - start), questions))]
        if siblings is not None:
            keys = np.where(np.isnan(picked), np.inf, rng.random(picked.shape))
            picked = np.take_along_axis(picked, keys.argsort(axis=-1)[..., :siblings], axis=-1)
        parts.append(_summarised(picked))
    count, values, naive, clustered = np.concatenate(parts, axis=1)
    there = count > 0  # without a teacher there is no estimate
    return Batches(questions, float(count[there].mean()), values[there], naive[there], clustered[there])


def _summarised(picked: Array) -> Array:
    """Return number of sequences, mean, and both standard errors of batches ``(draws, questions, siblings)``."""
    there = ~np.isnan(picked)
    count = there.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(picked, axis=(1, 2)) / count
        residual = np.where(there, picked - mean[:, None, None], 0.0)
        naive = np.sqrt((residual**2).sum(axis=(1, 2)) / (count - 1) / count)
        by_question = residual.sum(axis=2)
        asked = there.any(axis=2).sum(axis=1)
        clustered = np.sqrt((by_question**2).sum(axis=1) * asked / np.where(asked > 1, asked - 1, np.nan)) / count
    return np.stack([count, mean, naive, clustered])


def design_effect(table: Array, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return the variance of a mean over that of independent sequences, with its 95 % bootstrap interval.

    Args:
        table: From :func:`arranged`; questions are drawn anew.
        draws: Number of bootstrap draws.
        seed: Seed of the bootstrap.
    """
    ratio = lambda found: (found[3] / found[2]) ** 2  # noqa: E731
    drawn = draw_batches(table, len(table), draws, seed)
    low, high = np.quantile((drawn.clustered / drawn.naive) ** 2, [0.025, 0.975])
    return float(ratio(_summarised(table[None]))[0]), float(low), float(high)


def sequences_for(table: Array, sensitivity: float, spread: float) -> float:
    r"""Return how many sequences it takes until the relative spread of exp(alpha I) is small.

    By linearisation :math:`sd(\rho)/\rho = \alpha\, sd(I)`, with the correlation of siblings and without bounds of rho.

    Args:
        table: From :func:`arranged`.
        sensitivity: PGPO's alpha.
        spread: Wanted relative standard deviation.
    """
    count, _, _, clustered = _summarised(table[None])[:, 0]
    return float(count * (sensitivity * clustered / spread) ** 2)


def relative_spread(rho: Array) -> float:
    """Return the standard deviation over the mean."""
    return float(rho.std(ddof=1) / rho.mean()) if len(rho) > 1 else math.nan
