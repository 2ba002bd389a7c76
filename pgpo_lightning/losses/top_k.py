"""Closed-form gradients of divergences over the student's likeliest tokens, or with bounded summands.

Let u_v = d divergence / d log q_v, where all log q are treated as independent. Then the gradient in the logits is
``u - q sum(u)``. A clipped summand has u_v = 0.
"""

import torch
from torch import Tensor

from pgpo_lightning.losses.divergence import MAX_LOG_RATIO, Divergence


def _pointwise(a: Tensor, b: Tensor, which: Divergence) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the divergence of log-distributions ``(n, K)``, the same without clipping, and u = d divergence / d log q.

    The second is ``None`` if no summand is bounded. u ignores the normalisation of q.
    """
    alpha = which.alpha
    d = (b - a).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # log p/q, (n, K)
    rest: Tensor | None = None  # the part of the summands that is not in u
    if alpha == 0.0:
        p = b.exp()
        entries, u = d.mul_(p), p.neg_()
    elif alpha == 1.0:
        q = a.exp()
        entries = d.mul_(q).neg_()
        u = q.add_(entries)
    else:
        log_m_over_q = torch.expm1(d).mul_(alpha).log1p_()
        u = log_m_over_q.mul(a.exp()).mul_(-(1 - alpha))
        entries, rest = u, d.sub_(log_m_over_q).mul_(b.exp()).mul_(alpha)
    if which.entry_clip is None:
        return entries.sum(-1) if rest is None else entries.sum(-1) + rest.sum(-1), None, u
    entries = entries if rest is None else rest.add_(u)
    plain = entries.sum(-1)
    return entries.clamp(max=which.entry_clip).sum(-1), plain, u.masked_fill_(entries > which.entry_clip, 0.0)


def clipped_gradient(a: Tensor, b: Tensor, which: Divergence) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the divergence over all tokens with bounded summands, and its gradient; see :func:`top_k_gradient`."""
    value, plain, u = _pointwise(a, b, which)
    return value, plain, u.sub_(a.exp().mul_(u.sum(-1, keepdim=True)))


def top_k_gradient(a: Tensor, b: Tensor, which: Divergence) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a divergence that is not a plain sum over all tokens, and its gradient with respect to the student's logits.

    Args:
        a: Student log-probabilities, shape ``(n, V)``.
        b: Teacher log-probabilities, shape ``(n, V)``.
        which: The divergence, with ``top_k < V`` or bounded summands.

    Returns:
        The divergence, ``(n,)``; the same with unbounded summands, or ``None`` if none is bounded; the gradient, ``(n, V)``.
    """
    if which.top_k is None or which.top_k >= a.size(-1):
        return clipped_gradient(a, b, which)
    kept = a.topk(which.top_k, dim=-1).indices  # (n, k)
    a_kept, b_kept = a.gather(-1, kept), b.gather(-1, kept)
    if not which.add_tail:
        # After renormalisation the buckets are a softmax over the kept logits alone.
        a_kept, b_kept = a_kept.log_softmax(-1), b_kept.log_softmax(-1)
        value, plain, u = _pointwise(a_kept, b_kept, which)
        gradient = torch.zeros_like(a)
        return value, plain, gradient.scatter_(-1, kept, u - a_kept.exp() * u.sum(-1, keepdim=True))
    lowest = torch.finfo(a.dtype).min
    # The tail is summed over the complement of the kept tokens, as in `divergence.student_top_k`.
    a_tail = a.scatter(-1, kept, lowest).logsumexp(-1, keepdim=True)
    b_tail = b.scatter(-1, kept, lowest).logsumexp(-1, keepdim=True)
    value, plain, u = _pointwise(torch.cat([a_kept, a_tail], -1), torch.cat([b_kept, b_tail], -1), which)
    total = u.sum(-1, keepdim=True)  # (n, 1)
    # A tail token j has d log(tail)/dz_j = q_j / Q, a kept token the derivative of its own logarithm. The normaliser is common.
    tail_factor = (u[:, -1:] / a_tail.exp().clamp(min=torch.finfo(a.dtype).tiny)) - total
    gradient = a.exp().mul_(tail_factor)
    return value, plain, gradient.scatter_(-1, kept, u[:, :-1] - a_kept.exp() * total)
