r"""The predictive law of self-distillation (arXiv 2605.30070): the gain of training is a line in the gap before it.

.. math:: \Delta(c) \approx a + b\,g(c)

The line predicts the gain of a configuration whose gap is measured with the same error as those of the fitted points. For
this purpose regression on the measured gap, by least squares, is correct. The slope with respect to the true gap is steeper by
1 / reliability; both are reported. Deming's and York's regressions assume independent errors of the points, and gaps measured
on the same questions and the same student are correlated. The bootstrap over questions and seeds
(:func:`pgpo_lightning.probe.calibration.bootstrap`) resamples them together. SciPy's `linregress` has no leave-one-out errors
and no prediction interval.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A fitted line and its errors.

    Attributes:
        gaps: The points' g, ``(n,)``.
        gains: Their Delta, ``(n,)``.
        intercept: a.
        slope: b.
    """

    gaps: Vector
    gains: Vector
    intercept: float
    slope: float

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.gaps)

    @property
    def spread(self) -> float:
        """Sum of squares of the gaps around their mean."""
        return float(((self.gaps - self.gaps.mean()) ** 2).sum())

    @property
    def residuals(self) -> Vector:
        """Gains minus fitted values, ``(n,)``."""
        return self.gains - self.intercept - self.slope * self.gaps

    @property
    def scatter(self) -> float:
        """Standard deviation around the line with n - 2 degrees of freedom."""
        return math.sqrt(float(self.residuals @ self.residuals) / (self.n - 2))

    @property
    def leverage(self) -> Vector:
        """Weight of every point in its own fitted value, ``(n,)``. The line passes through a point of weight 1; the sum is 2."""
        return 1 / self.n + (self.gaps - self.gaps.mean()) ** 2 / self.spread

    @property
    def left_out(self) -> Vector:
        """Leave-one-out error: each gain minus its prediction from the other points, ``(n,)``."""
        return self.residuals / (1 - self.leverage)

    @property
    def loo_rmse(self) -> float:
        """Root mean square of :attr:`left_out`."""
        return float(np.sqrt((self.left_out**2).mean()))

    @property
    def r2(self) -> float:
        """Fraction of the variance of the gains that the line explains."""
        return 1 - float(self.residuals @ self.residuals) / self._total

    @property
    def loo_r2(self) -> float:
        """The same with each point predicted from the others. Negative if that is worse than the mean of all points."""
        return 1 - float(self.left_out @ self.left_out) / self._total

    @property
    def loo_constant(self) -> float:
        """Leave-one-out error without the gap: each point is predicted by the mean gain of the others."""
        errors = (self.gains - self.gains.mean()) * self.n / (self.n - 1)
        return float(np.sqrt((errors**2).mean()))

    def intervals(self, level: float = 0.95) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the intervals of intercept and slope over other configurations (Student's t with n - 2 degrees of freedom).

        They contain how far configurations are from the line, which a bootstrap over questions and seeds does not.
        """
        t = float(student_t.isf((1 - level) / 2, self.n - 2))
        slope = t * self.scatter / math.sqrt(self.spread)
        intercept = t * self.scatter * math.sqrt(1 / self.n + float(self.gaps.mean()) ** 2 / self.spread)
        return (
            (self.intercept - intercept, self.intercept + intercept),
            (self.slope - slope, self.slope + slope),
        )

    @property
    def _total(self) -> float:
        return float(((self.gains - self.gains.mean()) ** 2).sum())

    def predict(self, gap: float, level: float = 0.95, extrapolate: bool = False) -> tuple[float, float]:
        """Return the predicted gain of a new configuration and the half width of its prediction interval.

        Args:
            gap: Its g, measured as those of the fitted points.
            level: Of the interval (Student's t with n - 2 degrees of freedom).
            extrapolate: Allow a gap outside the calibrated range.

        Raises:
            ValueError: If the gap is outside the calibrated range and `extrapolate` is False.
        """
        low, high = self.gaps.min(), self.gaps.max()
        if not low <= gap <= high and not extrapolate:
            raise ValueError(
                f"Expected a gap within the calibrated range [{low:.4f}, {high:.4f}], but got {gap:.4f}. Calibrate with a run "
                "beyond it, or give `--extrapolate`."
            )
        away = 1 + 1 / self.n + (gap - self.gaps.mean()) ** 2 / self.spread
        half = float(student_t.isf((1 - level) / 2, self.n - 2)) * self.scatter * math.sqrt(away)
        return self.intercept + self.slope * gap, half


def fit(gaps: Vector, gains: Vector) -> Line:
    """Fit the line by least squares.

    Args:
        gaps: Measured before training, ``(n,)``.
        gains: Held-out score at the end less that at the start, ``(n,)``.

    Raises:
        ValueError: If there are fewer than three points, or fewer than three different gaps.

    Example:
        >>> line = fit(np.array([0.0, 0.1, 0.2]), np.array([0.01, 0.14, 0.33]))
        >>> round(line.slope, 3), round(line.loo_rmse, 4)
        (1.6, 0.052)
    """
    if len(gaps) < 3:
        raise ValueError(
            f"Expected at least 3 configurations to fit a line and estimate its error, but got {len(gaps)}."
        )
    if len(np.unique(gaps)) < 3:
        raise ValueError(f"Expected at least 3 different gaps, but got {sorted(set(gaps.tolist()))}.")
    away = gaps - gaps.mean()
    slope = float(away @ gains / (away @ away))
    return Line(gaps, gains, float(gains.mean() - slope * gaps.mean()), slope)


def lines(gaps: NDArray[np.float64], gains: NDArray[np.float64]) -> tuple[Vector, Vector]:
    """Return intercepts and slopes of many fits, ``(draws,)`` each; NaN where all gaps are equal.

    Args:
        gaps: ``(draws, n)``.
        gains: ``(draws, n)``.
    """
    away = gaps - gaps.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (away * gains).sum(axis=1) / (away**2).sum(axis=1)
    return gains.mean(axis=1) - slopes * gaps.mean(axis=1), slopes


def reliability(gaps: Vector, noise: float) -> float:
    """Return the fraction of the variance of the gaps that is not measurement error: at most 1, below 0 if all is error.

    Args:
        gaps: ``(n,)``.
        noise: Expected variance between the errors of the gaps. An error common to all gaps, such as that of `none`, is not
            part of it, because it shifts the line and does not change its slope.
    """
    return 1 - noise / float(gaps.var(ddof=1))
