"""What a constant multiplier does to the stationary variance under SGD and Adam, on the update and on the loss. Simulated.

Adam divides by the size of the gradient, so neither SDE of SGD is Adam's. Where noise dominates, an Adam step is about
``-eta rho (a theta + noise) / sigma``, so that its variance is near ``eta rho sigma / (2 a)``; and a factor on the loss cancels.
"""

from dataclasses import dataclass

import torch
from scipy.stats import t as student_t

from benchmarks.theory.sde_quadratic import Quadratic

RULES = ("SGD, update", "SGD, loss", "Adam, update", "Adam, loss")
"""Optimizer, and what rho multiplies."""


@dataclass(frozen=True)
class Simulated:
    """A stationary variance.

    Attributes:
        rule: One of :data:`RULES`.
        rho: The multiplier.
        value: Mean over chains of the mean square over the second half of the steps.
        low: Lower end of its 95 % interval over chains.
        high: Upper end.
    """

    rule: str
    rho: float
    value: float
    low: float
    high: float


def simulate(problem: Quadratic, rule: str, rho: float, eta: float, steps: int, chains: int, seed: int) -> Simulated:
    """Run independent chains on a quadratic from its minimum.

    Every rule and multiplier is given the same noise, so that their differences are surer than the values.

    Args:
        problem: Curvature and noise.
        rule: One of :data:`RULES`.
        rho: The multiplier.
        eta: Step size.
        steps: The first half is not counted.
        chains: Number of chains, at least 2.
        seed: Seed of the noise.
    """
    optimizer_name, target = rule.split(", ")
    # Adam works number by number: one parameter with an entry per chain is as many runs.
    theta = torch.zeros(chains, dtype=torch.float64, requires_grad=True)
    rate = eta * rho if target == "update" else eta
    scale = rho if target == "loss" else 1.0
    make = torch.optim.Adam if optimizer_name == "Adam" else torch.optim.SGD
    optimizer = make([theta], lr=rate, foreach=False)
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(chains, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(chains, generator=generator, dtype=torch.float64)
        theta.grad = scale * (problem.curvature * theta.detach() + problem.noise * noise)
        optimizer.step()
        if step >= steps // 2:
            squares += theta.detach().square()
    squares /= steps - steps // 2
    value = squares.mean().item()
    half = float(student_t.isf(0.025, chains - 1)) * squares.std().item() / chains**0.5
    return Simulated(rule, rho, value, value - half, value + half)
