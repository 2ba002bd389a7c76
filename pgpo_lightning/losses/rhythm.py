"""Factors of token advantages that look for the moments at which a response turns (DRIFT, arXiv 2606.30345)."""

import torch
from torch import Tensor

from pgpo_lightning.losses.fused import TokenStatistics

SMALLEST_DEVIATION = 1e-6


def exploration_bonus(log_ratio: Tensor, lengths: Tensor, sensitivity: float, maximum: float) -> Tensor:
    """Return how much more the student likes a token than the teacher does, ``b = min(exp(tau max(Delta, 0)), B_max) - 1``.

    ``Delta = log S - log T`` of the sampled token minus the mean of that over the response.

    Args:
        log_ratio: log S - log T (nats), shape ``(N,)``, one response after the other.
        lengths: Tokens of each response, shape ``(sequences,)``.
        sensitivity: tau.
        maximum: B_max, at least 1.

    Returns:
        Shape ``(N,)``, from 0 to ``maximum - 1``.

    Example:
        >>> exploration_bonus(torch.tensor([0.5, -0.5]), torch.tensor([2]), 1.0, 2.0)
        tensor([0.6487, 0.0000])
    """
    delta = log_ratio - _mean(log_ratio, lengths)
    return (sensitivity * delta.clamp(min=0)).clamp(max=80).exp().clamp(max=maximum) - 1


def rhythm_gate(
    entropy_student: Tensor, entropy_teacher: Tensor, lengths: Tensor, sharpness: float, gain: float, bound: float
) -> Tensor:
    """Return a gate of mean about 1, high where the teacher becomes certain and the student does not.

    ``D = max(Drop T - Drop S, 0) max(H(S) - H(T), 0)``, where a drop is the entropy of the token before minus that of the token,
    0 for the first; ``g = 2 max(sigmoid(a z(D)) - 1/2, 0)`` with D standardised over the response; ``m = 1 + lambda g``, divided
    by its mean over the response and clipped.

    Args:
        entropy_student: H(S) (nats), shape ``(N,)``, one response after the other.
        entropy_teacher: H(T) (nats), shape ``(N,)``.
        lengths: Tokens of each response, shape ``(sequences,)``.
        sharpness: a.
        gain: lambda.
        bound: Largest distance of the gate from 1.

    Returns:
        Shape ``(N,)``.
    """
    first = torch.zeros_like(entropy_student, dtype=torch.bool)
    first[lengths.cumsum(0) - lengths] = True
    gap = entropy_student - entropy_teacher
    # Drop T - Drop S is by how much the gap has grown since the token before.
    growth = torch.where(first, 0.0, gap - gap.roll(1))
    anchor = growth.clamp(min=0) * gap.clamp(min=0)
    centred = anchor - _mean(anchor, lengths)
    deviation = _mean(centred.square(), lengths).sqrt()
    gate = 2 * ((sharpness * centred / (deviation + SMALLEST_DEVIATION)).sigmoid() - 0.5).clamp(min=0)
    raised = 1 + gain * gate
    return (raised / _mean(raised, lengths)).clamp(1 - bound, 1 + bound)


def rhythm_factors(
    tokens: TokenStatistics,
    lengths: Tensor,
    *,
    strength: float,
    sensitivity: float,
    maximum: float,
    sharpness: float,
    gain: float,
    bound: float,
) -> Tensor:
    """Return ``M = 1 + beta g b`` of every token, shape ``(N,)``, at least 1 and without gradient.

    Args:
        tokens: Statistics of whole responses, one after the other.
        lengths: Tokens of each response, shape ``(sequences,)``.
        strength: beta.
        sensitivity: See :func:`exploration_bonus`.
        maximum: See :func:`exploration_bonus`.
        sharpness: See :func:`rhythm_gate`.
        gain: See :func:`rhythm_gate`.
        bound: See :func:`rhythm_gate`.
    """
    log_ratio = tokens.log_p_student.detach() - tokens.log_p_teacher
    bonus = exploration_bonus(log_ratio, lengths, sensitivity, maximum)
    entropies = tokens.entropy_student.detach(), tokens.entropy_teacher
    return 1 + strength * rhythm_gate(*entropies, lengths, sharpness, gain, bound) * bonus


def _mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over its response at every token, ``(N,)``."""
    sequence = torch.arange(len(lengths), device=lengths.device)
    sequence = sequence.repeat_interleave(lengths, output_size=values.numel())
    sums = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
    return (sums.index_add(0, sequence, values) / lengths)[sequence]
