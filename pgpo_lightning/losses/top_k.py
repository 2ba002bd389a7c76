"""Closed-form gradients of divergences over the student's likeliest tokens, or with bounded summands.

Let u_v = d divergence / d log q_v, where all log q are treated as independent. Then the gradient in the logits is
``u - q sum(u)``. A clipped summand has u_v = 0.

Over k kept tokens and a tail, u has k + 1 entries, and a token j of the tail gets ``q_j (u_tail / q_tail - sum(u))``: its
probability times one number per row. So neither needs a tensor of the size of the vocabulary.
"""

import math
from typing import NamedTuple

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
    """Return the divergence over all tokens with bounded summands, and its gradient with respect to the student's logits.

    Args:
        a: Student log-probabilities, shape ``(n, V)``.
        b: Teacher log-probabilities, shape ``(n, V)``.
        which: The divergence, with bounded summands.

    Returns:
        The divergence, ``(n,)``; the same with unbounded summands; the gradient, ``(n, V)``.
    """
    value, plain, u = _pointwise(a, b, which)
    return value, plain, u.sub_(a.exp().mul_(u.sum(-1, keepdim=True)))


class Buckets(NamedTuple):
    """The gradient of a divergence over some kept tokens and, with a tail, one bucket for all others.

    Attributes:
        kept: The kept tokens, shape ``(n, k)``.
        a: Their log q, shape ``(n, k)``.
        gradient: The derivative of the divergence in their logits, shape ``(n, k)``.
        rest: The derivative in the logit of any other token, divided by its probability, shape ``(n,)``.
    """

    kept: Tensor
    a: Tensor
    gradient: Tensor
    rest: Tensor


def likeliest(a: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` largest entries of each row ``(n, V)``, in no particular order, shape ``(n, k)``.

    On a CPU ``topk`` is slow in long rows. The row is therefore divided into sets of `size` entries. The k sets with the largest
    maxima contain k largest entries: an entry of any other set is no larger than the k maxima of these.
    """
    n, vocabulary = a.shape
    size = 2 ** round(
        0.5 * math.log2(max(1.0, vocabulary / k))
    )  # about where both selections have equally many candidates
    sets = vocabulary // size
    if a.device.type != "cpu" or size < 4 or sets < k:
        return a.topk(k, dim=-1, sorted=False).indices
    whole = sets * size
    # Entry j belongs to set j % sets, so that maxima are taken over whole vectors.
    chosen = a[:, :whole].view(n, size, sets).amax(1).topk(k, dim=-1, sorted=False).indices  # (n, k)
    candidates = (chosen.unsqueeze(1) + torch.arange(0, whole, sets).view(1, size, 1)).view(n, -1)  # (n, size * k)
    if whole < vocabulary:
        candidates = torch.cat([candidates, torch.arange(whole, vocabulary).expand(n, -1)], dim=1)
    best = a.gather(-1, candidates).topk(k, dim=-1, sorted=False).indices
    return candidates.gather(-1, best)


def bucket_gradient(
    a: Tensor, b: Tensor, q: Tensor, p: Tensor, which: Divergence, k: int
) -> tuple[Tensor, Tensor | None, Buckets]:
    """Return a divergence over the student's likeliest tokens, and its gradient with respect to the student's logits.

    Args:
        a: Student log-probabilities, shape ``(n, V)``.
        b: Teacher log-probabilities, shape ``(n, V)``.
        q: The student's probabilities, shape ``(n, V)``. Entries are overwritten and restored.
        p: The teacher's probabilities, likewise.
        which: The divergence.
        k: Its ``top_k``, less than V.

    Returns:
        The divergence, ``(n,)``; the same with unbounded summands, or ``None`` if none is bounded; the gradient.
    """
    kept = likeliest(a, k)  # (n, k)
    a_kept, b_kept = a.gather(-1, kept), b.gather(-1, kept)
    if not which.add_tail:
        # After renormalisation the buckets are a softmax over the kept logits alone.
        a_own = a_kept.log_softmax(-1)
        value, plain, u = _pointwise(a_own, b_kept.log_softmax(-1), which)
        gradient = u - a_own.exp() * u.sum(-1, keepdim=True)
        return value, plain, Buckets(kept, a_kept, gradient, torch.zeros_like(value))
    q_tail, p_tail = _tail(q, kept), _tail(p, kept)  # (n, 1)
    value, plain, u = _pointwise(torch.cat([a_kept, q_tail.log()], -1), torch.cat([b_kept, p_tail.log()], -1), which)
    total = u.sum(-1, keepdim=True)  # (n, 1)
    # A tail token j has d log(tail)/dz_j = q_j / Q, a kept token the derivative of its own logarithm. The normaliser is common.
    rest = (u[:, -1:] / q_tail - total).squeeze(-1)
    return value, plain, Buckets(kept, a_kept, u[:, :-1] - a_kept.exp() * total, rest)


def _tail(probabilities: Tensor, kept: Tensor) -> Tensor:
    """Return the probability of all tokens that are not kept, ``(n, 1)``, positive.

    It is summed over them, as in `divergence.student_top_k`: 1 minus the sum of the kept would be rounded to 0.
    """
    own = probabilities.gather(-1, kept)
    total = probabilities.scatter_(-1, kept, 0.0).sum(-1, keepdim=True)
    probabilities.scatter_(-1, kept, own)
    return total.clamp_(min=torch.finfo(total.dtype).tiny)
