r"""PGPO on a quadratic, where everything is known: :math:`L = a\theta^2/2`, Gaussian gradient noise, a constant multiplier.

The iterates and every linear SDE beside them are Gaussian, so their mean and variance say all. Symbols: a curvature,
:math:`\sigma` noise, :math:`\eta` step size, :math:`\rho` multiplier, x = :math:`\eta\rho a`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from pgpo_lightning.core.settings import Positive, checked

SDE = Literal["paper", "scaled", "order-2 drift", "no noise"]
"""``paper``: diffusion sqrt(eta) Sigma^1/2, as PGPO's Theorem 2(ii) has it (arXiv 2606.03620). ``scaled``: sqrt(eta) rho
Sigma^1/2. ``order-2 drift``: the same with the drift that makes the approximation one of order 2 (Li, Tai and E 2017).
``no noise``: the paper's drift alone."""

SDES: tuple[SDE, ...] = ("paper", "scaled", "order-2 drift", "no noise")


class Gaussian(NamedTuple):
    """A law.

    Attributes:
        mean: Mean of theta.
        variance: Variance of theta.
    """

    mean: float
    variance: float

    def expectations(self) -> dict[str, float]:
        """Return the test functions: mean, second moment, variance, and a cosine for what is no polynomial."""
        m, v = self
        return {"mean": m, "second moment": m * m + v, "variance": v, "cosine": math.exp(-v / 2) * math.cos(m)}


@partial(checked, prefix="quadratic.")
@dataclass(frozen=True)
class Quadratic:
    """The problem.

    Attributes:
        curvature: a, above 0.
        noise: Standard deviation of the gradient.
        start: theta at time 0.
    """

    curvature: Positive = 1.0
    noise: Positive = 1.0
    start: float = 1.0

    def discrete(self, rho: float, eta: float, steps: int) -> Gaussian:
        r"""Return the law after some steps of ``theta - eta rho (a theta + noise)``.

        :math:`m_N = (1-x)^N m_0` and :math:`v_N = \eta^2\rho^2\sigma^2 (1-(1-x)^{2N}) / (1-(1-x)^2)`.
        """
        factor = 1 - eta * rho * self.curvature
        return Gaussian(factor**steps * self.start, self.discrete_stationary(rho, eta) * (1 - factor ** (2 * steps)))

    def discrete_stationary(self, rho: float, eta: float) -> float:
        r"""Return the variance after infinitely many steps, :math:`\eta\rho\sigma^2 / (a (2 - x))`."""
        return eta * rho * self.noise**2 / (self.curvature * (2 - eta * rho * self.curvature))

    def sde(self, kind: SDE, rho: float, eta: float, time: float) -> Gaussian:
        r"""Return the law at a time of :math:`d\theta = -\kappa\theta\,dt + \sqrt{D}\,dW` (Ornstein-Uhlenbeck)."""
        rate, diffusion = self.coefficients(kind, rho, eta)
        return Gaussian(math.exp(-rate * time) * self.start, -diffusion / (2 * rate) * math.expm1(-2 * rate * time))

    def sde_stationary(self, kind: SDE, rho: float, eta: float, euler_step: float = 0.0) -> float:
        r"""Return the stationary variance :math:`D/(2\kappa)`, or that of an Euler simulation.

        Args:
            kind: Which SDE.
            rho: Multiplier.
            eta: Step size of PGPO.
            euler_step: Step h of an Euler-Maruyama scheme, whose own variance is :math:`D/(\kappa(2-\kappa h))`.
        """
        rate, diffusion = self.coefficients(kind, rho, eta)
        return diffusion / (rate * (2 - rate * euler_step))

    def coefficients(self, kind: SDE, rho: float, eta: float) -> tuple[float, float]:
        r"""Return the rate :math:`\kappa` and the squared diffusion D of an SDE."""
        rate = rho * self.curvature
        if kind == "paper":
            return rate, eta * self.noise**2
        if kind == "no noise":
            return rate, 0.0
        # The drift of order 2 is that of L + eta/4 |grad L|^2, with rho L in the place of L.
        return rate * (1 + eta * rate / 2 if kind == "order-2 drift" else 1), eta * (rho * self.noise) ** 2
