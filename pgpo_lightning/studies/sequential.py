r"""Levels of a study that is looked at several times while seeds are added. Pure functions.

A report after every few seeds is a new chance for a false answer. With a spending function (Lan and DeMets 1983) the error
rate over all looks together is that of a single one: :math:`\alpha(t)` is the probability of a false answer by the fraction
:math:`t` of the seeds, and each look may add its increment.

- `obrien-fleming`: :math:`\alpha(t) = 2 - 2\Phi(z_{\alpha/2} / \sqrt t)`. Early looks demand much; the last one costs little.
- `pocock`: :math:`\alpha(t) = \alpha \ln(1 + (e - 1) t)`. All looks have similar levels, and studies end sooner.

SciPy has no group-sequential design. The level of a look is found with the density of the partial sum of the studies that have
not ended before (Armitage, McPherson and Rowe 1969), on a grid.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import simpson
from scipy.optimize import brentq
from scipy.stats import norm

from pgpo_lightning.core.settings import Count, Filled, checked

Spending = Literal["obrien-fleming", "pocock"]

FARTHEST = 8.0
"""Standard deviations to which partial sums are followed; beyond, the probability is below 1e-15."""

POINTS = 2001
"""Of the grid: levels then have four correct digits."""


@checked
@dataclass(frozen=True)
class SequentialPlan:
    """When a study is looked at, and how much of the error rate each look may spend.

    Attributes:
        looks: Numbers of seeds, rising. The last one is the largest size of the study.
        spending: The spending function.

    Raises:
        ValueError: If the looks do not rise or start below two seeds.
    """

    looks: Annotated[tuple[Count, ...], Filled()]
    spending: Spending = "obrien-fleming"

    def __post_init__(self) -> None:
        if list(self.looks) != sorted(set(self.looks)) or self.looks[0] < 2:
            raise ValueError(f"Expected `looks` to be rising numbers of seeds from 2 on, but got {list(self.looks)}.")

    def level(self, seeds: int, alpha: float) -> float:
        """Return the one-sided level of an analysis of `seeds` seeds.

        Args:
            seeds: Number of seeds that are analysed.
            alpha: One-sided error rate of all looks together.

        Returns:
            The level of the look; 0 between looks, where nothing may be concluded. Beyond the last look, its level: more seeds
            than planned are no new chance only if the last look was skipped.
        """
        if seeds > self.looks[-1]:
            return levels(self.looks, self.spending, alpha)[-1]
        return levels(self.looks, self.spending, alpha)[self.looks.index(seeds)] if seeds in self.looks else 0.0

    def next_look(self, seeds: int) -> int | None:
        """Return the first look with more than `seeds` seeds, or None after the last."""
        return next((look for look in self.looks if look > seeds), None)


def spent(fraction: float, spending: Spending, alpha: float) -> float:
    """Return the error rate that may be spent by a fraction of the seeds.

    Example:
        >>> round(spent(0.5, "obrien-fleming", 0.025), 5), round(spent(0.5, "pocock", 0.025), 5)
        (0.00153, 0.0155)
    """
    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    return float(2 * norm.sf(norm.isf(alpha / 2) / math.sqrt(fraction)))


@lru_cache(maxsize=256)
def levels(looks: tuple[int, ...], spending: Spending, alpha: float = 0.025) -> tuple[float, ...]:
    """Return the one-sided level of each look.

    Args:
        looks: Numbers of seeds, rising.
        spending: The spending function.
        alpha: One-sided error rate of all looks together.

    Example:
        >>> [round(level, 5) for level in levels((5, 10, 15, 20, 30), "obrien-fleming")]
        [0.0, 0.0001, 0.00149, 0.00556, 0.02305]
    """
    found: list[float] = []
    sums = np.zeros(1)  # of the studies that go on, on a grid: (points,)
    density = np.ones(1)
    before = done = 0.0
    for look in looks:
        fraction = look / looks[-1]
        deviation = math.sqrt(fraction - before)
        target = spent(fraction, spending, alpha) - done

        def excess(
            bound: float,
            sums: NDArray[np.float64] = sums,
            density: NDArray[np.float64] = density,
            deviation: float = deviation,
            target: float = target,
        ) -> float:
            return float(_integral(density * norm.sf((bound - sums) / deviation), sums)) - target

        scale = math.sqrt(fraction)
        bound = float(brentq(excess, -FARTHEST * scale, FARTHEST * scale, xtol=1e-12))
        found.append(float(norm.sf(bound / scale)))
        grid = np.linspace(-FARTHEST * scale, bound, POINTS)
        steps = norm.pdf((grid[:, None] - sums) / deviation) / deviation
        density = _integral(steps * density, sums)
        sums, before, done = grid, fraction, done + target
    return tuple(found)


def _integral(values: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integrate over the last axis; a single point holds the whole probability."""
    return values[..., 0] if len(points) == 1 else simpson(values, x=points)
