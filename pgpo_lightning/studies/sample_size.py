"""How many seeds or questions a comparison needs, from the variance that was observed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import norm

from pgpo_lightning.studies.inference import Mean

FEWEST = 5
"""Seeds below which the variance between seeds is too poorly known for a plan."""

NEEDS = ("seeds_needed", "seeds_if_seen", "questions_needed")
"""The sample sizes of :func:`needs`."""


MOST = 2.0**20
"""Seeds beyond which a number counts as unlimited."""

DRAWS = 400
"""Of the variances, for a range."""


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
    one = np.ones(1)
    (found,) = _seeds_for(mean, mean.seed_variance * one, mean.question_variance * one, distance, level, power)
    return int(found) if math.isfinite(found) else None


def _seeds_for(
    mean: Mean,
    by_seed: NDArray[np.float64],
    by_question: NDArray[np.float64],
    distance: float,
    level: float,
    power: float,
) -> NDArray[np.float64]:
    """Return the numbers of seeds for many pairs of variances; infinite where no number is enough."""
    questions = mean.questions - 1

    def enough(seeds: NDArray[np.float64]) -> NDArray[np.bool_]:
        ratio = mean.seeds / seeds
        cell, seed = mean.cell_variance * ratio, by_seed * ratio
        question = by_question - mean.cell_variance * (1 - ratio)
        variance = np.maximum(seed + question - cell, cell)
        rows = seeds - 1
        freedom = rows
        if questions:
            spread = seed**2 / rows + question**2 / questions + cell**2 / (rows * questions)
            fewest = np.minimum(rows, questions)
            freedom = np.maximum(fewest, np.divide(variance**2, spread, out=fewest.copy(), where=spread > 0))
        reach = -stdtrit(freedom, (1 - level) / 2) - stdtrit(freedom, 1 - power)
        return reach * np.sqrt(variance) <= distance

    low, high = np.ones_like(by_seed), np.full_like(by_seed, MOST)
    possible = enough(high)
    while (high - low > 1).any():
        middle = np.maximum(np.floor((low + high) / 2), 2)
        reached = enough(middle)
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.where(possible, high, np.inf)


def questions_for(mean: Mean, distance: float, level: float = 0.95, power: float = 0.8) -> int:
    """Return the least number of held-out questions that :func:`seeds_for` needs with an unlimited number of seeds."""
    reach = float(norm.isf([(1 - level) / 2, 1 - power]).sum())
    return math.ceil(mean.questions * (mean.question_variance - mean.cell_variance) * (reach / distance) ** 2)


def seeds_range(mean: Mean, distance: float, level: float = 0.95, power: float = 0.8) -> tuple[int, int | None] | None:
    """Return the 5 % and 95 % limits of :func:`seeds_for`, because the variances are themselves estimates.

    The mean square of `n` seeds is distributed like chi-square with `n - 1` degrees of freedom, and so is that of questions.

    Returns:
        Both limits; the second one is None where no number of seeds may be enough. None with fewer than :data:`FEWEST` seeds, and
        where hardly any variances leave a number that is enough.
    """
    if mean.seeds < FEWEST:
        return None
    rng = np.random.default_rng(0)

    def drawn(variance: float, units: int) -> NDArray[np.float64]:
        return variance * (units - 1) / rng.chisquare(units - 1, DRAWS) if units > 1 else np.full(DRAWS, variance)

    by_seed = drawn(mean.seed_variance, mean.seeds)
    by_question = np.maximum(drawn(mean.question_variance, mean.questions), mean.cell_variance)
    found = _seeds_for(mean, by_seed, by_question, distance, level, power)
    low, high = np.quantile(found, [0.05, 0.95], method="nearest")
    if not math.isfinite(low):
        return None
    return int(low), int(high) if math.isfinite(high) else None


def needs(mean: Mean, margin: float, level: float) -> dict[str, Any]:
    """Return the sample sizes with which a comparison that is not resolved would be resolved (80 % power).

    Args:
        mean: Of the paired differences.
        margin: The smallest difference of interest.
        level: Of the interval that decides.

    Returns:
        `seeds_needed`, the range that distinguishes a true difference of 0 from the margin; `seeds_if_seen`, the range that is
        enough if the observed difference is the true one; `questions_needed` where no number of seeds is enough. The upper end
        of a range is None where no number may be enough. None for what is not known.
    """
    found: dict[str, Any] = dict.fromkeys(NEEDS)
    if mean.seeds < FEWEST or mean.error == 0:
        return found
    seen = seeds_range(mean, max(mean.value, margin - mean.value), level)
    point, needed = seeds_for(mean, margin, level), seeds_range(mean, margin, level)
    if point is None:
        found["questions_needed"] = questions_for(mean, margin, level)
    elif point <= mean.seeds:
        # Reached already: the observed difference is between 0 and the margin and distinct from neither.
        needed = seen
    return found | {"seeds_needed": needed, "seeds_if_seen": seen}
