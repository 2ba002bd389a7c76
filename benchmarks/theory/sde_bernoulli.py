r"""PGPO on the smallest self-distillation there is, with a multiplier that depends on the state and on the batch.

The student answers yes with probability :math:`s = \mathrm{sigmoid}(\theta)`; the teacher, shown one of two equally likely
feedbacks, with :math:`t_1` or :math:`t_2`. Per feedback the loss KL(t||s) has the gradient s - t, and a step averages over B of
them. Information is the entropy difference of Eq. 8 (arXiv 2606.03620), :math:`I = h(s) - \overline{h(t)}`, and at the minimum,
where s is the mean of the teachers, the mutual information of answer and feedback.

Nothing is simulated. A batch has B + 1 outcomes, so one step is a linear map of functions of theta; on Chebyshev points it is
a small matrix, whose power is the exact law after N steps. An SDE becomes such a matrix through one weak step of order 2
(Platen; Kloeden and Platen 1992, section 15.1), so short that its error does not show.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgpo_lightning.core.settings import LowerBound, NonNegative, Range, UpperBound, checked

Array = NDArray[np.float64]

Signal = Literal["state", "independent", "shared"]
"""Where I comes from: the ``state`` alone (all feedbacks, no noise); an ``independent`` batch; or the batch that the gradient
has ``shared`` with it, as in PGPO."""

SDE = Literal["paper", "scaled", "matched", "order-2 drift", "no noise"]
"""As in :mod:`benchmarks.theory.sde_quadratic`, with rho at the I of the state; ``matched``: drift and covariance those of the
product ``rho * gradient``, and ``order-2 drift`` on top of that."""

SIGNALS: tuple[Signal, ...] = ("state", "independent", "shared")
SDES: tuple[SDE, ...] = ("paper", "scaled", "matched", "order-2 drift", "no noise")

_MARGIN = 2.0  # of the interval beyond all that steps can reach: twenty standard deviations of the SDEs' noise
_TAPER = 30  # power of the distance from the centre with which an SDE's noise ends at the interval's ends
_HALVINGS = 14  # an SDE's time is cut into 2 ** 14 steps


class Moments(NamedTuple):
    """Mean and variance of a step over its outcomes, each of shape ``(n,)``."""

    mean: Array
    variance: Array


def binary_entropy(p: Array) -> Array:
    """Return the entropy of yes and no, in nats."""
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


@partial(checked, prefix="bernoulli.")
@dataclass(frozen=True)
class Bernoulli:
    """The problem.

    Attributes:
        teachers: Probabilities of a yes under the two feedbacks.
        batch: B, feedbacks per step; at most 32, because all outcomes are listed.
        sensitivity: PGPO's alpha.
        rho_min: Lower bound of rho; None keeps everything smooth, which is what theorems on order ask for.
        rho_max: Upper bound. I is at most ln 2 here, so 2 binds only for a sensitivity above 1.
        start: theta at time 0.
        nodes: Chebyshev points. Where a bound puts a kink into rho they leave errors of about 1e-5, which fall with their number;
            elsewhere none that shows.
    """

    teachers: tuple[float, float] = (0.9, 0.3)
    batch: Annotated[int, Range(least=1, most=32)] = 4
    sensitivity: NonNegative = 1.0
    rho_min: LowerBound | None = None
    rho_max: UpperBound = 2.0
    start: float = -2.0
    nodes: Annotated[int, Range(least=16)] = 96

    @property
    def information(self) -> float:
        """Mutual information of answer and feedback (nats), which I is at the minimum."""
        t = np.array(self.teachers)
        return float(binary_entropy(t.mean()) - binary_entropy(t).mean())

    def rho(self, information: Array) -> Array:
        """Return the multiplier (Eq. 9)."""
        return np.clip(np.exp(self.sensitivity * information), self.rho_min, self.rho_max)

    def outcomes(self, theta: Array, signal: Signal) -> tuple[Array, Array, Array]:
        """Return everything that a batch can be.

        Args:
            theta: Shape ``(n,)``.
            signal: Where I comes from.

        Returns:
            Probabilities ``(outcomes, 1)``, gradients and multipliers ``(outcomes, n)``.
        """
        count = np.arange(self.batch + 1)
        chance = np.array([math.comb(self.batch, int(k)) for k in count]) / 2.0**self.batch
        (first, second), entropies = self.teachers, binary_entropy(np.array(self.teachers))
        share = count / self.batch  # of the first feedback
        target, entropy = share * first + (1 - share) * second, share * entropies[0] + (1 - share) * entropies[1]
        if signal == "state":
            entropy = np.full_like(entropy, entropies.mean())
        elif signal == "independent":
            target, entropy = (each.ravel() for each in np.meshgrid(target, entropy))
            chance = np.outer(chance, chance).ravel()
        student = 1 / (1 + np.exp(-theta))
        gradient = student - target[:, None]
        return chance[:, None], gradient, self.rho(binary_entropy(student) - entropy[:, None])

    def gradient(self, theta: Array) -> Moments:
        """Return mean and variance of the gradient alone."""
        chance, gradient, _ = self.outcomes(theta, "state")
        return _moments(chance, gradient)

    def product(self, theta: Array, signal: Signal) -> Moments:
        """Return mean and variance of ``rho * gradient``."""
        chance, gradient, rho = self.outcomes(theta, signal)
        return _moments(chance, rho * gradient)

    def multiplier(self, theta: Array, signal: Signal) -> Moments:
        """Return mean and variance of rho."""
        chance, _, rho = self.outcomes(theta, signal)
        return _moments(chance, rho)

    def grid(self) -> "Chebyshev":
        """Return points over all that the steps can reach."""
        ends = [math.log(t / (1 - t)) for t in self.teachers] + [self.start]
        return Chebyshev(min(ends) - _MARGIN, max(ends) + _MARGIN, self.nodes)

    def discrete_map(self, signal: Signal, eta: float) -> Array:
        """Return the matrix of one step: function values before to their conditional expectations, ``(nodes, nodes)``."""
        grid = self.grid()
        chance, gradient, rho = self.outcomes(grid.points, signal)
        return grid.map(grid.points - eta * rho * gradient, chance[:, 0])

    def coefficients(self, kind: SDE, signal: Signal, eta: float, theta: Array) -> tuple[Array, Array]:
        """Return drift and diffusion of an SDE, each of the shape ``(n,)`` of theta."""
        mean, variance = self.gradient(theta)
        rho = self.rho(binary_entropy(1 / (1 + np.exp(-theta))) - binary_entropy(np.array(self.teachers)).mean())
        if kind == "paper":
            return -rho * mean, np.sqrt(eta * variance)
        if kind == "scaled":
            return -rho * mean, rho * np.sqrt(eta * variance)
        if kind == "no noise":
            return -rho * mean, 0 * mean
        mean, variance = self.product(theta, signal)
        if kind == "order-2 drift":
            width = 1e-4
            slope = (self.product(theta + width, signal).mean - self.product(theta - width, signal).mean) / (2 * width)
            mean = mean * (1 + eta / 2 * slope)
        return -mean, np.sqrt(eta * variance)

    def sde_map(self, kind: SDE, signal: Signal, eta: float, step: float) -> Array:
        """Return the matrix of one short time of an SDE, ``(nodes, nodes)``."""
        grid = self.grid()
        y, h = grid.points, step

        def of(theta: Array) -> tuple[Array, Array]:
            # Without noise at the ends, where the drift points inwards, nothing leaves, and all stays smooth.
            drift, diffusion = self.coefficients(kind, signal, eta, theta)
            return drift, diffusion * (1 - ((2 * theta - grid.low - grid.high) / (grid.high - grid.low)) ** _TAPER)

        a, b = of(y)
        above, below = (of(y + a * h + sign * b * math.sqrt(h))[1] for sign in (1, -1))
        ends = []
        for z in (-math.sqrt(3), 0.0, math.sqrt(3)):  # has the moments of a normal number up to the fifth
            w = z * math.sqrt(h)
            drift = (a + of(y + a * h + b * w)[0]) * h / 2
            noise = (above + below + 2 * b) * w / 4 + (above - below) * (w * w - h) / (4 * math.sqrt(h))
            ends.append(y + drift + noise)
        return grid.map(np.stack(ends), np.array([1 / 6, 2 / 3, 1 / 6]))

    def discrete(self, signal: Signal, eta: float, steps: int) -> dict[str, float]:
        """Return the test functions after some steps."""
        return self._expectations(np.linalg.matrix_power(self.discrete_map(signal, eta), steps))

    def sde(self, kind: SDE, signal: Signal, eta: float, time: float) -> dict[str, float]:
        """Return the test functions of an SDE at a time."""
        matrix = self.sde_map(kind, signal, eta, time / 2**_HALVINGS)
        return self._expectations(np.linalg.matrix_power(matrix, 2**_HALVINGS))

    def _expectations(self, matrix: Array) -> dict[str, float]:
        grid = self.grid()
        weights = grid.rows(np.array([self.start])) @ matrix  # (1, nodes): of the values of any test function
        functions: dict[str, Callable[[Array], Array]] = {
            "mean": lambda theta: theta,
            "second moment": lambda theta: theta**2,
            "probability": lambda theta: 1 / (1 + np.exp(-theta)),
        }
        found = {name: (weights @ function(grid.points)).item() for name, function in functions.items()}
        return found | {"variance": found["second moment"] - found["mean"] ** 2}


@dataclass(frozen=True)
class Chebyshev:
    """Interpolation on Chebyshev points of an interval, in barycentric form (Berrut and Trefethen 2004).

    Attributes:
        low: Left end.
        high: Right end.
        nodes: Number of points.
    """

    low: float
    high: float
    nodes: int

    @property
    def points(self) -> Array:
        """The points, ``(nodes,)``."""
        angles = np.pi * np.arange(self.nodes) / (self.nodes - 1)
        return (self.low + self.high) / 2 - (self.high - self.low) / 2 * np.cos(angles)

    def rows(self, at: Array) -> Array:
        """Return the matrix ``(n, nodes)`` from values at the points to values at other places ``(n,)``."""
        sign = (-1.0) ** np.arange(self.nodes)
        sign[[0, -1]] /= 2
        distance = at[:, None] - self.points
        exact = distance == 0
        terms = sign / np.where(exact, 1.0, distance)
        weights = terms / terms.sum(axis=1, keepdims=True)
        return np.where(exact.any(axis=1, keepdims=True), exact, weights)

    def map(self, ends: Array, chance: Array) -> Array:
        """Return the matrix of a random step.

        Args:
            ends: Where each point may go, ``(outcomes, nodes)``.
            chance: Probability of each outcome, ``(outcomes,)``.
        """
        return sum(p * self.rows(end) for p, end in zip(chance, ends, strict=True))


def _moments(chance: Array, values: Array) -> Moments:
    mean = (chance * values).sum(axis=0)
    return Moments(mean, (chance * (values - mean) ** 2).sum(axis=0))
