"""What an optimizer's momentum leaves of a multiplier: the weight that each batch's gradient ends up with.

With momentum b (beta1 of Adam) the update of step k is ``(1 - b) sum_i b^i g_(k-i)``. A multiplier of the *update* therefore
gives the gradient of batch j the weight ``w_j = (1 - b) sum_i b^i rho_(j+i)``, of which its own rho is 1 - b. A multiplier of the
*gradient*, before the moments, gives it rho_j. (Both relative to Adam's running scale.) See docs/theory.md.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch.optim import Optimizer

KNOWN = 0.95
"""A batch's weight counts as known when the steps so far hold this share of it."""


def momentum_of(optimizer: Optimizer) -> float:
    """Return the momentum of an optimizer's first group: beta1, `momentum`, or 0 if it has neither."""
    group = optimizer.param_groups[0]
    betas = group.get("betas")
    return float(betas[0]) if betas else float(group.get("momentum", 0.0))


def batch_weights(rho: list[float], momentum: float) -> NDArray[np.float64]:
    """Return the weight of each batch under multipliers of the update.

    The weight of a recent batch is that of the steps so far, divided by the share that they hold.

    Example:
        >>> batch_weights([2.0, 1.0, 1.0], 0.5).round(3).tolist()
        [1.571, 1.0, 1.0]

    Args:
        rho: Multipliers of the optimizer steps so far.
        momentum: b, in [0, 1).

    Returns:
        Weights, shape ``(steps,)``.
    """
    backwards = np.asarray(rho, dtype=np.float64)[::-1]
    sums = lfilter([1 - momentum], [1, -momentum], backwards)[::-1]
    return sums / (1 - momentum ** np.arange(len(rho), 0, -1))


def lag(momentum: float) -> int:
    """Return after how many further steps a batch's weight is known.

    Example:
        >>> lag(0.9), lag(0.0)
        (28, 0)
    """
    return max(0, math.ceil(math.log(1 - KNOWN) / math.log(momentum)) - 1) if momentum > 0 else 0
