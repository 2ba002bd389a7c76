"""Statistics of whole next-token distributions, and the gradient of the loss with respect to their logits in closed form.

Notation: q student, p teacher, a = log q, b = log p, z the student's logits over the temperature, m the mixture
``(1-alpha) q + alpha p``. With coefficients c_D, c_y, c_H of divergence, log q(y) and entropy H, the gradient in z is

    c_D q (x - <q, x>) + c_y (1[y] - q) - c_H q (a + H)

where x is log m/q times -(1-alpha) for the Jensen-Shannon divergence, a - b for the reverse KL (times the teacher's share of the
target, row by row, where that is softened), and where the first term is c_D (q - p) for the forward KL. Everything is a few
passes over rows; on a CPU they go through buffers that are used again for every block of rows, because fresh memory costs as
much as the arithmetic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pgpo_lightning.losses.divergence import MAX_LOG_RATIO, Divergence
from pgpo_lightning.losses.top_k import top_k_gradient

BUFFERS = 6
Buffers = list[Tensor] | None


class TokenStatistics(NamedTuple):
    """One value per response token, each of shape ``(N,)``, fp32 (fp64 for fp64 hidden states).

    Teacher values are NaN without a teacher. Entropies, `kl` (teacher from student) and log-probabilities are in nats, over the
    full vocabulary. `plain` is the divergence as it is without entry clip and softening.
    """

    divergence: Tensor
    log_p_student: Tensor
    log_p_teacher: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    kl: Tensor
    plain: Tensor

    def __getitem__(self, part: slice) -> "TokenStatistics":  # type: ignore[override]
        """Return the statistics of some tokens."""
        return TokenStatistics(*(values[part] for values in self))


class Coefficients(NamedTuple):
    """Derivatives of the loss by each token's divergence, log-probability and entropy, each ``(n,)``; ``None`` for zero."""

    divergence: Tensor | None
    log_p: Tensor | None
    entropy: Tensor | None


class RowTerms(NamedTuple):
    """What statistics and gradient share: tensors of shape ``(n, V)``.

    Attributes:
        a: log q.
        q: The student's probabilities.
        inner: x of the module's formula up to the factor `scale`, where the divergence has one.
        mean: <q, inner>, shape ``(n,)``.
        outer: The divergence's gradient, or a part of it, up to `scale`, where it has no such form.
        scale: See `inner` and `outer`; of every row, shape ``(n,)``, where the target is softened.
    """

    a: Tensor
    q: Tensor
    inner: Tensor | None
    mean: Tensor | None
    outer: Tensor | None
    scale: float | Tensor


def log_normalised(logits: Tensor, normaliser: Tensor | None, out: Tensor | None) -> Tensor:
    """Return log-probabilities; with their log-normaliser ``(n, 1)`` at hand one pass is enough."""
    return torch.log_softmax(logits, -1, out=out) if normaliser is None else logits - normaliser


def row_statistics(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    which: Divergence | None,
    normalisers: tuple[Tensor | None, Tensor | None] = (None, None),
    buffers: Buffers = None,
) -> tuple[RowTerms, TokenStatistics]:
    """Return the statistics of some rows and what their gradient is made of.

    Args:
        logits: Of the student, over the temperature, finite, shape ``(n, V)``.
        teacher_logits: Likewise, or ``None`` without a teacher.
        targets: Sampled tokens, shape ``(n,)``.
        which: The divergence; ``None`` for none.
        normalisers: Log-normalisers of student and teacher, ``(n, 1)``, where they are known.
        buffers: :data:`BUFFERS` tensors of the shape of `logits` to work in.
    """
    into_a, into_q, into_b, into_p, into_x, scratch = buffers or [None] * BUFFERS

    def dot(left: Tensor, right: Tensor) -> Tensor:
        # Not a matrix product: on a GPU those may be rounded to TF32.
        return torch.mul(left, right, out=scratch).sum(-1)

    at = targets.unsqueeze(-1)
    a = log_normalised(logits, normalisers[0], into_a)
    q = torch.exp(a, out=into_q)
    log_p_student, entropy_student = a.gather(-1, at).squeeze(-1), -dot(q, a)
    nothing = torch.full_like(log_p_student, torch.nan)
    if teacher_logits is None:
        statistics = TokenStatistics(nothing, log_p_student, nothing, entropy_student, nothing, nothing, nothing)
        return RowTerms(a, q, None, None, None, 0.0), statistics
    b = log_normalised(teacher_logits, normalisers[1], into_b)
    p = torch.exp(b, out=into_p)
    log_p_teacher, entropy_teacher = b.gather(-1, at).squeeze(-1), -dot(p, b)
    value, inner, mean, outer = nothing, None, None, None
    plain: Tensor | None = None  # where it is not the value
    scale: float | Tensor = 0.0
    partial = which is not None and which.partial(a.size(-1))
    if partial:
        value, plain, outer = top_k_gradient(a, b, which)
        scale = 1.0
    ratio = b.sub_(a).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = dot(p, ratio)
    if which is not None and not partial:
        if which.alpha == 0.0:
            value, outer, scale = kl.clone(), p, -1.0
        elif which.alpha == 1.0:
            inner, mean, scale = ratio, dot(q, ratio), -1.0
            value = -mean
            if which.softening is not None:
                plain = value
                log_m = torch.exp(ratio, out=into_x).add_(1).mul_(0.5).log_()  # over q
                rest = 1 - which.softening.student_fraction(0.5 * (kl - dot(p, log_m) - dot(q, log_m)))
                # The normaliser of T^(1-a) S^a, from T/S: where they agree, nothing cancels.
                log_target = torch.mul(ratio, rest.unsqueeze(-1), out=into_x).add_(a)
                value, scale = rest * value + log_target.logsumexp(-1), -rest
        else:
            # log m/q from p/q: where student and teacher agree, its error is that of p/q, not of two logarithms.
            inner = torch.exp(ratio, out=into_x).mul_(which.alpha).add_(1 - which.alpha).log_()
            mean, scale = dot(q, inner), -(1 - which.alpha)
            value = which.alpha * (kl - dot(p, inner)) + scale * mean
    statistics = TokenStatistics(value, log_p_student, log_p_teacher, entropy_student, entropy_teacher, kl,
                                 value.clone() if plain is None else plain)  # fmt: skip
    return RowTerms(a, q, inner, mean, outer, scale), statistics


def logit_gradient(
    made: RowTerms,
    statistics: TokenStatistics,
    targets: Tensor,
    by: Coefficients,
    slope: Tensor | float,
    out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the loss with respect to the raw logits, shape ``(n, V)``. Uses up `made`.

    Args:
        made: Of these rows.
        statistics: Of these rows.
        targets: Sampled tokens, shape ``(n,)``.
        by: Derivatives of the loss by the statistics.
        slope: Derivative of the logits over the temperature by the raw ones.
        out: Where to put it.
    """
    a, q, inner, mean, outer, scale = made
    everywhere = torch.zeros_like(statistics.log_p_student)  # times q
    x: Tensor | None = None
    if by.divergence is not None and inner is not None:
        by_x = by.divergence * scale
        x = inner.mul_(by_x.unsqueeze(-1))
        everywhere = everywhere - by_x * mean
    if by.divergence is not None and outer is not None and scale == -1.0:  # the forward KL: q - p
        everywhere = everywhere + by.divergence
    if by.log_p is not None:
        everywhere = everywhere - by.log_p
    if by.entropy is not None:
        everywhere = everywhere - by.entropy * statistics.entropy_student
        a = a.mul_(-by.entropy.unsqueeze(-1))
        x = a if x is None else x.add_(a)
    everywhere = everywhere.unsqueeze(-1)
    gradient = torch.mul(q, everywhere if x is None else x.add_(everywhere), out=out)
    if by.divergence is not None and outer is not None:
        gradient.addcmul_(outer, (by.divergence * scale).unsqueeze(-1))
    if by.log_p is not None:
        gradient.scatter_add_(-1, targets.unsqueeze(-1), by.log_p.unsqueeze(-1))
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


class Normalisation(NamedTuple):
    """Sums over the vocabulary that the gradient needs again, each ``(n, 1)`` or ``(n,)``."""

    student: Tensor
    teacher: Tensor | None
    mean: Tensor | None


def statistics_of(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, which: Divergence | None
) -> tuple[TokenStatistics, Normalisation]:
    """Return what :func:`row_statistics` does, but nothing of the size of the logits: to be compiled."""
    student = logits.logsumexp(-1, keepdim=True)
    teacher = None if teacher_logits is None else teacher_logits.logsumexp(-1, keepdim=True)
    made, statistics = row_statistics(logits, teacher_logits, targets, which, (student, teacher))
    return statistics, Normalisation(student, teacher, made.mean)


def gradient_of(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    which: Divergence | None,
    statistics: TokenStatistics,
    sums: Normalisation,
    by: Coefficients,
    slope: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient in the raw logits from the logits alone: to be compiled.

    Fused into one pass over both logits, making them again costs less than keeping what statistics and gradient share.
    """
    made, _ = row_statistics(logits, teacher_logits, targets, which, (sums.student, sums.teacher))
    return logit_gradient(made._replace(mean=sums.mean), statistics, targets, by, slope).to(dtype)
