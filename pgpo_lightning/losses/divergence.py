"""Divergences between student and teacher next-token distributions, as pure functions of log-probabilities.

Notation of the SDPO paper (arXiv 2601.20802): S is the student, T the teacher. `alpha` is SDPO's name of the mixing weight:
0 is the forward KL(T||S), 1 the reverse KL(S||T), anything between the generalised Jensen-Shannon divergence.
All results are in nats. Gradients flow through S, inside the mixture too; T is expected to carry none.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pgpo_lightning.core.settings import Positive, PositiveFraction, checked

# exp(60) is far beyond any ratio that matters in fp32; without the bound 0 * exp(large) would be 0 * inf.
MAX_LOG_RATIO = 60.0


def _log_ratio(log_s: Tensor, log_t: Tensor) -> Tensor:
    return (log_t - log_s).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return KL(T||S) over the last dimension.

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.

    Returns:
        Nats, shape ``(...)``.
    """
    return (log_t.exp() * _log_ratio(log_s, log_t)).sum(-1)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return KL(S||T) over the last dimension; shapes as in :func:`forward_kl`."""
    return -(log_s.exp() * _log_ratio(log_s, log_t)).sum(-1)


def generalised_jsd(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    r"""Return ``(1-alpha) KL(S||M) + alpha KL(T||M)`` with ``M = (1-alpha) S + alpha T``.

    Written in the log-ratio ``d = log T - log S``: ``log M/S = log1p(alpha (e^d - 1))``. So nothing of the size of the
    entropies cancels, and the result is accurate to second order when student and teacher nearly agree.

    As ``alpha`` goes to 0 or 1 this goes to ``alpha KL(T||S)`` or ``(1-alpha) KL(S||T)``, not to the KL itself: the end
    points of SDPO's `alpha` are separate losses (as in SDPO's code), about 4 times as steep as alpha = 0.5 near agreement.

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        alpha: Mixing weight of the teacher, strictly between 0 and 1.

    Returns:
        Nats, shape ``(...)``.
    """
    d = _log_ratio(log_s, log_t)
    log_m_over_s = torch.log1p(alpha * torch.expm1(d))
    return (alpha * log_t.exp() * (d - log_m_over_s) - (1 - alpha) * log_s.exp() * log_m_over_s).sum(-1)


def divergence(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """Return SDPO's per-token divergence for `alpha` in [0, 1]; shapes as in :func:`forward_kl`."""
    if alpha == 0.0:
        return forward_kl(log_s, log_t)
    if alpha == 1.0:
        return reverse_kl(log_s, log_t)
    return generalised_jsd(log_s, log_t, alpha)


def student_top_k(log_s: Tensor, log_t: Tensor, k: int, add_tail: bool) -> tuple[Tensor, Tensor]:
    """Reduce both distributions to the student's `k` likeliest tokens (SDPO's top-k distillation).

    The choice of tokens carries no gradient; their values do.

    Args:
        log_s: Student log-probabilities over the full vocabulary, shape ``(..., V)``.
        log_t: Teacher log-probabilities over the full vocabulary, shape ``(..., V)``.
        k: Number of tokens kept; at ``k >= V`` both distributions come back whole.
        add_tail: Put everything else into one further bucket; otherwise renormalise over the `k` tokens.

    Returns:
        The two reduced log-distributions, shape ``(..., k+1)`` with a tail and ``(..., k)`` without.
    """
    if k >= log_s.size(-1):
        return log_s, log_t
    kept = log_s.detach().topk(k, dim=-1).indices
    return _reduce(log_s, kept, add_tail), _reduce(log_t, kept, add_tail)


def _reduce(log_p: Tensor, kept: Tensor, add_tail: bool) -> Tensor:
    log_kept = log_p.gather(-1, kept)
    if not add_tail:
        return log_kept.log_softmax(-1)
    # The tail is summed over the complement. log(1 - sum of the kept) would be wrong by 1 nat at a tail mass of 3e-7.
    # The lowest finite number instead of -inf keeps the gradient defined where the complement has no mass at all.
    log_rest = log_p.scatter(-1, kept, torch.finfo(log_p.dtype).min)
    return torch.cat([log_kept, log_rest.logsumexp(-1, keepdim=True)], dim=-1)


def sampled_token(log_s: Tensor, log_t: Tensor, targets: Tensor) -> Tensor:
    """Return SDPO's sampled-token form, ``stopgrad(log S(y) - log T(y)) * log S(y)``.

    A policy gradient with the per-token advantage ``log T - log S``; its expected gradient is that of KL(S||T).

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        targets: Sampled token ids, shape ``(...)``.

    Returns:
        Loss per token, shape ``(...)``; its value is not a divergence.
    """
    log_s_y = log_s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    log_t_y = log_t.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (log_s_y - log_t_y).detach() * log_s_y


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy of a log-distribution over the last dimension, in nats, shape ``(...)``."""
    # where(): a masked vocabulary entry has log-probability -inf, and 0 * inf is not 0.
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)


def clipped_divergence(log_s: Tensor, log_t: Tensor, alpha: float, bound: float) -> Tensor:
    """Return :func:`divergence` with the contribution of every vocabulary entry bounded from above (OPSD, arXiv 2601.18734).

    ``sum_v min(l_v, bound)``, where l_v is the summand of the definition: ``T log T/S`` for the forward KL, ``S log S/T`` for
    the reverse one, ``(1-alpha) S log S/M + alpha T log T/M`` for the Jensen-Shannon divergence. Summands below zero, which the
    KLs have, are left alone. A summand at its bound has no gradient.

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        alpha: As in :func:`divergence`.
        bound: Nats.

    Returns:
        Nats, shape ``(...)``; below zero where much was clipped.
    """
    d, s, t = _log_ratio(log_s, log_t), log_s.exp(), log_t.exp()
    if alpha == 0.0:
        entries = t * d
    elif alpha == 1.0:
        entries = -s * d
    else:
        log_m_over_s = torch.log1p(alpha * torch.expm1(d))
        entries = alpha * t * (d - log_m_over_s) - (1 - alpha) * s * log_m_over_s
    return entries.clamp(max=bound).sum(-1)


@partial(checked, prefix="softening.")
@dataclass(frozen=True)
class Softening:
    """DemoPSD's target: the less the teacher agrees with the student, the nearer the target is to the student.

    With ``d = JSD(S, T)`` and ``a = 2 maximum (sigmoid(sharpness d) - 1/2)``, the target is ``T^(1-a) S^a``, normalised, and
    carries no gradient; the loss is KL(S||target), whose gradient is ``1 - a`` times that of KL(S||T) (arXiv 2607.02502).

    Args:
        maximum: Of a, in (0, 1]; the paper's a_max.
        sharpness: Of a to d; the paper's b, between 25 and 100 there.

    Raises:
        ValueError: If a setting is out of range.
    """

    maximum: PositiveFraction = 0.15
    sharpness: Positive = 50.0

    def student_fraction(self, disagreement: Tensor) -> Tensor:
        """Return a, the student's share of the target, from JSD(S, T) in nats; both of shape ``(...)``."""
        return 2 * self.maximum * (torch.sigmoid(self.sharpness * disagreement) - 0.5)


def softened_reverse_kl(log_s: Tensor, log_t: Tensor, softening: Softening) -> Tensor:
    """Return KL(S||target) for :class:`Softening`'s target; shapes as in :func:`forward_kl`."""
    share = softening.student_fraction(generalised_jsd(log_s, log_t, 0.5)).unsqueeze(-1)
    target = ((1 - share) * log_t + share * log_s).log_softmax(-1).detach()
    return reverse_kl(log_s, target)


@dataclass(frozen=True)
class Divergence:
    """Which divergence, over which tokens.

    Args:
        alpha: As in :func:`pgpo_lightning.losses.divergence.divergence`.
        top_k: Only the student's likeliest tokens; ``None`` for all.
        add_tail: With `top_k`, one more bucket for the rest.
        entry_clip: Bound of every entry's (with `top_k`: bucket's) contribution, see :func:`clipped_divergence`.
        softening: Of the target, for the reverse KL over all tokens.
    """

    alpha: float
    top_k: int | None = None
    add_tail: bool = True
    entry_clip: float | None = None
    softening: Softening | None = None

    @property
    def bound(self) -> float | None:
        """The largest value (nats), that of distributions with nothing in common; ``None`` for the KLs, which have none."""
        if self.alpha in (0.0, 1.0):
            return None
        return -(self.alpha * math.log(self.alpha) + (1 - self.alpha) * math.log1p(-self.alpha))

    def partial(self, vocabulary: int) -> bool:
        """Whether it is a sum over something else than all tokens as they are."""
        return self.entry_clip is not None or (self.top_k is not None and self.top_k < vocabulary)
