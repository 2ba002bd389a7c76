"""Advantages and losses of policy gradients: GRPO, RLSD (arXiv 2604.03128) and HAPO (arXiv 2603.11321), without any state."""

import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TieBreak = Literal["first", "random"]
"""Which of several rollouts with the same lowest reward is replaced."""

TOLERANCE = 1e-9


def group_advantages(rewards: Tensor, divide_by_std: bool, correction: int = 1) -> Tensor:
    """Return the difference between each reward and the mean of its group.

    Args:
        rewards: Shape ``(groups, n)``.
        divide_by_std: Also divide by the group's standard deviation.
        correction: Subtracted from n in the denominator of the standard deviation.

    Returns:
        Shape ``(groups, n)``; zero where all rewards of a group are equal.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), divide_by_std=False)
        tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std and rewards.size(1) > 1:
        advantages = advantages / (rewards.std(1, keepdim=True, correction=correction) + 1e-6)
    # Equal rewards have no advantage, even where their mean was rounded.
    return torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, advantages)


def clipped_policy_loss(
    log_p: Tensor, old_log_p: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Return PPO's clipped surrogate loss per token, with the dual clip of verl.

    Args:
        log_p: Log-probabilities of the sampled tokens (nats) with gradient, shape ``(N,)``.
        old_log_p: The same under the policy that the batch was sampled from, shape ``(N,)``.
        advantages: Shape ``(N,)``.
        clip_low: Ratios below ``1 - clip_low`` are clipped.
        clip_high: Ratios above ``1 + clip_high`` are clipped.
        dual_clip: Upper bound of the loss at negative advantages, in multiples of the advantage; ``None`` for none.

    Returns:
        Shape ``(N,)``.
    """
    # Beyond exp(20) every ratio is clipped anyway; the bound keeps the exponential finite.
    ratio = (log_p - old_log_p).clamp(-20, 20).exp()  # (N,)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def kl_estimate(log_p: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) at sampled tokens: ``r - log r - 1`` with ``r = reference / policy``.

    It is never negative, and unbiased for tokens of the policy (Schulman, *Approximating KL divergence*, 2020; GRPO,
    arXiv 2402.03300, Eq. 4). As a loss its gradient is ``1 - r`` times that of `log_p`.

    Args:
        log_p: Log-probabilities of the sampled tokens (nats) with gradient, shape ``(N,)``.
        reference: The same under the reference, shape ``(N,)``.

    Returns:
        Nats, shape ``(N,)``. Beyond 20 nats the difference is clipped, so that exp() stays finite.

    Example:
        >>> kl_estimate(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
        tensor([0.1931])
    """
    log_ratio = (reference - log_p).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def credited_advantages(advantages: Tensor, log_ratio: Tensor, mixing: float, bound: float) -> Tensor:
    """Return advantages per token (RLSD, CEPO): the response's, larger where the teacher's evidence has the same sign.

    ``A [(1 - mixing) + mixing clip(exp(sign(A) log_ratio), 1 - bound, 1 + bound)]``

    Args:
        advantages: Advantage of each token's response, shape ``(n,)``.
        log_ratio: log T - log S of the sampled tokens (nats), shape ``(n,)``; for CEPO log T+ - log T-, of two contexts of the
            teacher.
        mixing: Weight of the evidence, lambda.
        bound: Largest distance of the evidence's factor from 1.

    Returns:
        Shape ``(n,)``, without gradient.
    """
    # As above, exp() stays finite.
    evidence = (advantages.sign() * log_ratio.detach()).clamp(-20, 20).exp()
    return advantages * ((1 - mixing) + mixing * evidence.clamp(1 - bound, 1 + bound))


# HAPO replaces one failure of a group by a verified demonstration where the group has few successes. "Few" is decided by the
# mean of a Beta posterior of the group's own success rate.


def confidence(successes: float, failures: float) -> float:
    """Return the mean of the posterior Beta(1 + successes, 1 + failures) of a question's success rate (HAPO, Eq. 5 and 6).

    Args:
        successes: Rollouts that succeeded; a fraction if older rollouts are discounted.
        failures: Rollouts that failed, likewise.

    Example:
        >>> [confidence(s, 8 - s) for s in (0, 4, 8)]
        [0.1, 0.5, 0.9]
    """
    return (1 + successes) / (2 + successes + failures)


def confidence_below(successes: float, failures: float, threshold: float) -> bool:
    """Return whether the confidence is strictly below a threshold (HAPO, Algorithm 1).

    The comparison multiplies instead of dividing, and has a tolerance, so that 8/10 is not below 0.8 in binary fractions.

    Args:
        successes: See :func:`confidence`.
        failures: See :func:`confidence`.
        threshold: In [0, 1].

    Example:
        >>> [confidence_below(s, 8 - s, 0.8) for s in (6, 7)]
        [True, False]
    """
    return 1 + successes < threshold * (2 + successes + failures) - TOLERANCE


def replaced_index(rewards: Sequence[float], success: float, ties: TieBreak, rng: random.Random) -> int | None:
    """Return which rollout of a group a demonstration replaces: the one with the lowest reward (HAPO, Eq. 7), if it failed.

    Args:
        rewards: Rewards of the group.
        success: Rewards of at least this value are successes.
        ties: Which of several with the lowest reward. Unspecified in the paper.
        rng: Source of a random choice.

    Returns:
        The index, or ``None`` if no rollout failed.

    Example:
        >>> replaced_index([1.0, 0.0, 0.0], 0.5, "first", random.Random(0))
        1
        >>> replaced_index([1.0, 1.0], 0.5, "first", random.Random(0)) is None
        True
    """
    worst = [i for i, reward in enumerate(rewards) if reward == min(rewards)]
    if min(rewards) >= success:
        return None
    return worst[0] if ties == "first" else rng.choice(worst)


def shaped_probability(log_p: Tensor, shaping: float) -> Tensor:
    """Return f(p) = p / (p + g), LUFFY's shaped importance weight against a demonstrator with probability 1.

    Its derivative with respect to log p is g p / (p + g)^2. It is largest (1/4) at p = g, and small for tokens that are almost
    certain or very unlikely under the policy.

    Args:
        log_p: Log-probabilities of the demonstration's tokens under the student (nats), shape ``(N,)``, with gradient.
        shaping: g.

    Returns:
        Shape ``(N,)``.
    """
    return (log_p - log_p.new_tensor(shaping).log()).sigmoid()
