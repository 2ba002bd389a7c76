"""The gradient of a divergence over the student's likeliest tokens, in closed form."""

import torch
from torch import Tensor

from pgpo_lightning.divergence import MAX_LOG_RATIO, Divergence


def _pointwise(a: Tensor, b: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of (log-)distributions ``(n, K)`` and u = d divergence / d log q, ignoring normalisation."""
    if alpha == 0.0:
        p = b.exp()
        return (p * (b - a).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).sum(-1), p.neg_()
    q = a.exp()
    if alpha == 1.0:
        d = (a - b).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        u = d.mul_(q)
        return u.sum(-1), u.add_(q)
    d = (b - a).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_q = torch.expm1(d).mul_(alpha).log1p_()
    u = log_m_over_q.mul(q).mul_(-(1 - alpha))
    rest = d.sub_(log_m_over_q).mul_(b.exp()).mul_(alpha)
    return u.sum(-1) + rest.sum(-1), u


def top_k_gradient(a: Tensor, b: Tensor, which: Divergence) -> tuple[Tensor, Tensor]:
    """Return the divergence over the student's likeliest tokens and its gradient with respect to the student's logits.

    Args:
        a: Student log-probabilities, shape ``(n, V)``.
        b: Teacher log-probabilities, shape ``(n, V)``.
        which: Which divergence, with ``top_k < V``.

    Returns:
        Shapes ``(n,)`` and ``(n, V)``.
    """
    kept = a.topk(which.top_k, dim=-1).indices
    a_kept, b_kept = a.gather(-1, kept), b.gather(-1, kept)
    if not which.add_tail:
        # Renormalised, the buckets are a softmax of the kept logits alone.
        a_kept, b_kept = a_kept.log_softmax(-1), b_kept.log_softmax(-1)
        value, u = _pointwise(a_kept, b_kept, which.alpha)
        gradient = torch.zeros_like(a)
        return value, gradient.scatter_(-1, kept, u - a_kept.exp() * u.sum(-1, keepdim=True))
    lowest = torch.finfo(a.dtype).min
    a_tail = a.scatter(-1, kept, lowest).logsumexp(-1, keepdim=True)
    b_tail = b.scatter(-1, kept, lowest).logsumexp(-1, keepdim=True)
    value, u = _pointwise(torch.cat([a_kept, a_tail], -1), torch.cat([b_kept, b_tail], -1), which.alpha)
    total = u.sum(-1, keepdim=True)
    # A tail token j has d log(tail)/dz_j = q_j / Q; every kept one its own logarithm. All share the normaliser.
    share = (u[:, -1:] / a_tail.exp().clamp(min=torch.finfo(a.dtype).tiny)) - total
    gradient = a.exp().mul_(share)
    return value, gradient.scatter_(-1, kept, u[:, :-1] - a_kept.exp() * total)
