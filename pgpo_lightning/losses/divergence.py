"""Divergences between student and teacher next-token distributions, as pure functions of log-probabilities.

Notation of the SDPO paper (arXiv 2601.20802): S is the student, T the teacher. `alpha` is SDPO's name for the mixing weight:
0 is the forward KL(T||S), 1 the reverse KL(S||T), and values in between the generalised Jensen-Shannon divergence.
All results are in nats. Gradients flow through S, also inside the mixture; T is expected to carry none.
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

    It is computed from the log-ratio ``d = log T - log S``: ``log M/S = log1p(alpha (e^d - 1))``. So no terms of the size of the
    entropies cancel, and the result is accurate to second order when student and teacher nearly agree.

    As ``alpha`` goes to 0 or 1 this goes to ``alpha KL(T||S)`` or ``(1-alpha) KL(S||T)``, not to the KL itself. The end points of
    SDPO's `alpha` are separate losses, as in SDPO's code, and are about 4 times as steep as alpha = 0.5 near agreement.

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        alpha: Mixing weight of the teacher, strictly between 0 and 1.

    Returns:
        Nats, shape ``(...)``.
    """
    d = _log_ratio(log_s, log_t)  # (..., V)
    log_m_over_s = torch.log1p(alpha * torch.expm1(d))  # (..., V)
    return (alpha * log_t.exp() * (d - log_m_over_s) - (1 - alpha) * log_s.exp() * log_m_over_s).sum(-1)


def divergence(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """Return SDPO's per-token divergence for `alpha` in [0, 1]; shapes as in :func:`forward_kl`.

    The reference that tests compare with. Training computes the same in
    :func:`~pgpo_lightning.losses.fused_backward.row_statistics`, with its gradient.
    """
    if alpha == 0.0:
        return forward_kl(log_s, log_t)
    if alpha == 1.0:
        return reverse_kl(log_s, log_t)
    return generalised_jsd(log_s, log_t, alpha)


def student_top_k(log_s: Tensor, log_t: Tensor, k: int, add_tail: bool) -> tuple[Tensor, Tensor]:
    """Reduce both distributions to the student's `k` likeliest tokens (SDPO's top-k distillation).

    The selection of tokens carries no gradient; their values do.

    Args:
        log_s: Student log-probabilities over the full vocabulary, shape ``(..., V)``.
        log_t: Teacher log-probabilities over the full vocabulary, shape ``(..., V)``.
        k: Number of tokens kept; at ``k >= V`` both distributions are returned unchanged.
        add_tail: Put all other tokens into one more bucket; otherwise renormalise over the `k` tokens.

    Returns:
        The two reduced log-distributions, shape ``(..., k+1)`` with a tail and ``(..., k)`` without.
    """
    if k >= log_s.size(-1):
        return log_s, log_t
    kept = log_s.detach().topk(k, dim=-1).indices  # (..., k)
    return _reduce(log_s, kept, add_tail), _reduce(log_t, kept, add_tail)


def _reduce(log_p: Tensor, kept: Tensor, add_tail: bool) -> Tensor:
    log_kept = log_p.gather(-1, kept)  # (..., k)
    if not add_tail:
        return log_kept.log_softmax(-1)
    # The tail is summed over the complement: log(1 - sum of the kept) would be wrong by 1 nat at a tail mass of 3e-7. The lowest
    # finite number instead of -inf keeps the gradient defined where the complement has no mass.
    log_rest = log_p.scatter(-1, kept, torch.finfo(log_p.dtype).min)
    return torch.cat([log_kept, log_rest.logsumexp(-1, keepdim=True)], dim=-1)


def sampled_token(log_s: Tensor, log_t: Tensor, targets: Tensor) -> Tensor:
    """Return SDPO's sampled-token form, ``stopgrad(log S(y) - log T(y)) * log S(y)``.

    This is a policy gradient with the per-token advantage ``log T - log S``. Its expected gradient is that of KL(S||T).

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        targets: Sampled token ids, shape ``(...)``.

    Returns:
        Loss per token, shape ``(...)``; its value is not a divergence.
    """
    log_s_y = log_s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    log_t_y = log_t.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (log_s_y - log_t_y).detach() * log_s_y


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy of a log-distribution over the last dimension, in nats, shape ``(...)``."""
    # where(): a masked vocabulary entry has log-probability -inf, and 0 * inf is not 0.
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)


def greedy_cross_entropy(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return ``-log S(v)`` of the teacher's likeliest token v: the forward KL from a teacher that is certain (TGPO, 2605.13230).

    Shapes as in :func:`forward_kl`.
    """
    return -log_s.gather(-1, log_t.argmax(-1, keepdim=True)).squeeze(-1)


def clipped_divergence(log_s: Tensor, log_t: Tensor, alpha: float, bound: float) -> Tensor:
    """Return :func:`divergence` with the contribution of every vocabulary entry bounded from above (OPSD, arXiv 2601.18734).

    The result is ``sum_v min(l_v, bound)`` with the summands l_v of the definition: ``T log T/S`` for the forward KL,
    ``S log S/T`` for the reverse KL, ``(1-alpha) S log S/M + alpha T log T/M`` for the Jensen-Shannon divergence. Negative
    summands, which the KLs have, are unchanged. A clipped summand has no gradient.

    Args:
        log_s: Student log-probabilities, shape ``(..., V)``.
        log_t: Teacher log-probabilities, shape ``(..., V)``.
        alpha: As in :func:`divergence`.
        bound: Upper bound of a summand (nats).

    Returns:
        Nats, shape ``(...)``; negative where much was clipped.
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
    """DemoPSD's target: the more student and teacher disagree, the closer the target is to the student (arXiv 2607.02502).

    With ``d = JSD(S, T)`` and ``a = 2 maximum (sigmoid(sharpness d) - 1/2)``, the target is ``T^(1-a) S^a``, normalised and
    without gradient. The loss is KL(S||target), whose gradient is ``1 - a`` times that of KL(S||T).

    Args:
        maximum: Upper bound of a, in (0, 1]; the paper's a_max.
        sharpness: How fast a grows with d; the paper's b, which is between 25 and 100 there.

    Raises:
        ValueError: If a setting is out of range.
    """

    maximum: PositiveFraction = 0.15
    sharpness: Positive = 50.0

    def student_fraction(self, disagreement: Tensor) -> Tensor:
        """Return a, the student's fraction of the target, from JSD(S, T) in nats; both have shape ``(...)``."""
        return 2 * self.maximum * (torch.sigmoid(self.sharpness * disagreement) - 0.5)


def softened_reverse_kl(log_s: Tensor, log_t: Tensor, softening: Softening) -> Tensor:
    """Return KL(S||target) for the target of :class:`Softening`; shapes as in :func:`forward_kl`."""
    fraction = softening.student_fraction(generalised_jsd(log_s, log_t, 0.5)).unsqueeze(-1)  # (..., 1)
    target = ((1 - fraction) * log_t + fraction * log_s).log_softmax(-1).detach()
    return reverse_kl(log_s, target)


@dataclass(frozen=True)
class Divergence:
    """Which divergence, over which tokens.

    Args:
        alpha: As in :func:`pgpo_lightning.losses.divergence.divergence`.
        top_k: Number of the student's likeliest tokens that are compared; ``None`` for all.
        add_tail: With `top_k`, one more bucket for the rest.
        entry_clip: Bound of the contribution of every entry (with `top_k`: bucket) in nats, see :func:`clipped_divergence`.
        softening: Softening of the target, for the reverse KL over all tokens.
        greedy: Compare with the teacher's likeliest token alone (:func:`greedy_cross_entropy`), whatever the other fields say.
    """

    alpha: float
    top_k: int | None = None
    add_tail: bool = True
    entry_clip: float | None = None
    softening: Softening | None = None
    greedy: bool = False

    @property
    def bound(self) -> float | None:
        """The largest value (nats), reached by distributions without overlap; ``None`` for the KLs, which are unbounded."""
        if self.alpha in (0.0, 1.0):
            return None
        return -(self.alpha * math.log(self.alpha) + (1 - self.alpha) * math.log1p(-self.alpha))

    def partial(self, vocabulary: int) -> bool:
        """Whether the divergence is not a plain sum over all tokens of the vocabulary."""
        return self.entry_clip is not None or (self.top_k is not None and self.top_k < vocabulary)
