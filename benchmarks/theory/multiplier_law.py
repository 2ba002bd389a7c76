"""Mean and variance of rho = clip(exp(alpha I), rho_min, rho_max) when I is normal, and the bound on its variance."""

import math
from typing import NamedTuple


class Law(NamedTuple):
    """Mean and variance of the multiplier."""

    mean: float
    variance: float


def multiplier_law(mean: float, deviation: float, sensitivity: float, rho_min: float, rho_max: float) -> Law:
    r"""Return mean and variance of rho in closed form.

    With z the bounds of I in standard units,
    :math:`E\rho^k = \rho_{min}^k \Phi(z_1) + \rho_{max}^k \Phi(-z_2) + e^{k\alpha\mu + k^2\alpha^2 s^2/2} [\Phi(z_2 - k\alpha s)
    - \Phi(z_1 - k\alpha s)]`. A mean over many sequences is near normal, so this is the noise that a batch puts into a step.

    Args:
        mean: Mean of I (nats).
        deviation: Standard deviation of I (nats).
        sensitivity: PGPO's alpha.
        rho_min: At least 0; 0 for no bound.
        rho_max: ``inf`` for no bound.

    Example:
        >>> law = multiplier_law(0.0, 0.1, 1.0, 0.0, float("inf"))  # log-normal: exp(0.005)
        >>> round(law.mean, 6)
        1.005013
    """
    if deviation * sensitivity == 0:
        return Law(min(max(math.exp(sensitivity * mean), rho_min), rho_max), 0.0)
    low = (math.log(rho_min) / sensitivity - mean) / deviation if rho_min > 0 else -math.inf
    high = (math.log(rho_max) / sensitivity - mean) / deviation
    # Powers of rho / exp(alpha mean): close to 1, so that their difference keeps its digits.
    unit = math.exp(sensitivity * mean)
    first, second = (_moment(k, low, high, sensitivity * deviation, rho_min / unit, rho_max / unit) for k in (1, 2))
    return Law(unit * first, unit**2 * max(0.0, second - first**2))


def _moment(k: int, low: float, high: float, spread: float, least: float, most: float) -> float:
    total = math.exp((k * spread) ** 2 / 2) * (_phi(high - k * spread) - _phi(low - k * spread))
    below = least**k * _phi(low) if least > 0 else 0.0
    return total + below + (most**k * _phi(-high) if math.isfinite(most) else 0.0)


def _phi(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def variance_bound(deviation: float, sensitivity: float, rho_max: float) -> float:
    """Return the bound (alpha rho_max)^2 Var(I) on Var(rho), from the Lipschitz constant of rho in I."""
    return (sensitivity * rho_max * deviation) ** 2
