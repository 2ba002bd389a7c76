"""The formulas of HAPO (Hindsight-Anchored Policy Optimization, arXiv 2603.11321), without any state.

A group of n rollouts with few successes gets a verified demonstration in place of one of its failures. *Few* is judged from the
group's own successes, by the mean of a Beta posterior.
"""

import random
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Choice = Literal["first", "random"]
"""Which of several equally bad rollouts is meant."""

TOLERANCE = 1e-9


def confidence(successes: float, failures: float) -> float:
    """Return the mean of the posterior Beta(1 + successes, 1 + failures) of a question's success rate (Eq. 5 and 6).

    Args:
        successes: Rollouts that succeeded; a fraction where older ones count less.
        failures: Rollouts that did not.

    Example:
        >>> [confidence(s, 8 - s) for s in (0, 4, 8)]
        [0.1, 0.5, 0.9]
    """
    return (1 + successes) / (2 + successes + failures)


def below(successes: float, failures: float, threshold: float) -> bool:
    """Return whether the confidence lies strictly below a threshold (Algorithm 1).

    Compared without a division and with a tolerance, because 8/10 is not below 0.8 whatever its binary fractions say.

    Example:
        >>> [below(s, 8 - s, 0.8) for s in (6, 7)]
        [True, False]
    """
    return 1 + successes < threshold * (2 + successes + failures) - TOLERANCE


def to_replace(rewards: Sequence[float], success: float, ties: Choice, rng: random.Random) -> int | None:
    """Return which rollout of a group a demonstration takes the place of: the worst (Eq. 7), if it failed.

    Args:
        rewards: Of the group.
        success: Rewards from here on are no failure.
        ties: Which of several that are equally bad. The paper does not say.
        rng: Source of that choice.

    Example:
        >>> to_replace([1.0, 0.0, 0.0], 0.5, "first", random.Random(0))
        1
        >>> to_replace([1.0, 1.0], 0.5, "first", random.Random(0)) is None
        True
    """
    worst = [i for i, reward in enumerate(rewards) if reward == min(rewards)]
    if min(rewards) >= success:
        return None
    return worst[0] if ties == "first" else rng.choice(worst)


def shaped(log_p: Tensor, shaping: float) -> Tensor:
    """Return f(p) = p / (p + g), LUFFY's shaped importance weight against a demonstrator of probability 1.

    Its slope in log p is g p / (p + g)^2: largest, a quarter, at p = g, and small for tokens that the policy is sure of and
    for those that it hardly ever samples.

    Args:
        log_p: Log-probabilities of the demonstration's tokens under the student (nats), shape ``(N,)``, with gradient.
        shaping: g.

    Returns:
        Shape ``(N,)``.
    """
    return (log_p - log_p.new_tensor(shaping).log()).sigmoid()
