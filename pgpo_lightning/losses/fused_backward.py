"""Statistics of whole next-token distributions, and the gradient of the loss with respect to their logits in closed form.

Notation: q student, p teacher, a = log q, b = log p, z the student's logits over the temperature, m the mixture
``(1-alpha) q + alpha p``. With coefficients c_D, c_y, c_H of divergence, log q(y) and entropy H, the gradient in z is

    c_D q (x - <q, x>) + c_y (1[y] - q) - c_H q (a + H)

where x is log m/q times -(1-alpha) for the Jensen-Shannon divergence, and a - b for the reverse KL. With a softened target, a - b
is multiplied by the teacher's fraction of the target, row by row. For the forward KL the first term is c_D (q - p).

All of this takes a few passes over rows. On a CPU they write into buffers that are reused for every block of rows, because
allocating memory costs as much as the arithmetic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pgpo_lightning.losses.divergence import MAX_LOG_RATIO, Divergence
from pgpo_lightning.losses.top_k import Buckets, bucket_gradient, clipped_gradient

BUFFERS = 6
"""Work tensors that :func:`row_statistics` can use."""

Buffers = list[Tensor] | None


class TokenStatistics(NamedTuple):
    """One value per response token, each of shape ``(N,)``, fp32 (fp64 for fp64 hidden states).

    Teacher values are NaN without a teacher. Entropies, `kl` (KL(teacher||student)) and log-probabilities are in nats, over the
    full vocabulary. `plain` is the divergence without entry clip and softening.
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
    """Derivatives of the loss in each token's divergence, log-probability and entropy, ``(n,)``; ``None`` stands for zero."""

    divergence: Tensor | None
    log_p: Tensor | None
    entropy: Tensor | None


class RowTerms(NamedTuple):
    """Terms that statistics and gradient have in common, of shape ``(n, V)`` unless stated otherwise.

    A divergence gives one of three: `inner`, `mean` and `scale`, for the gradient ``scale q (inner - mean)``, in which a
    constant in `inner` cancels; `outer`, `scale` and `own`, for ``scale outer + own q``; or `buckets`.

    Attributes:
        a: log q.
        q: The student's probabilities.
        inner: x of the module's formula without the factor `scale`; ``None`` if the divergence has no such form.
        mean: <q, inner>, shape ``(n,)``.
        outer: The gradient of a divergence without that form, or a part of it, without the factor `scale`.
        scale: Factor of `inner` and `outer`. One per row, shape ``(n,)``, if the target is softened.
        own: Factor of q beside `outer`: 1 for the forward KL, whose gradient is q - p, also from a teacher that is certain.
        buckets: The gradient of a divergence over the student's likeliest tokens.
    """

    a: Tensor
    q: Tensor
    inner: Tensor | None
    mean: Tensor | None
    outer: Tensor | None
    scale: float | Tensor
    buckets: Buckets | None = None
    own: float = 0.0


def log_normalised(logits: Tensor, normaliser: Tensor | None, out: Tensor | None) -> Tensor:
    """Return log-probabilities. If their log-normaliser ``(n, 1)`` is known, one pass is enough."""
    return torch.log_softmax(logits, -1, out=out) if normaliser is None else logits - normaliser


def row_statistics(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    which: Divergence | None,
    normalisers: tuple[Tensor | None, Tensor | None] = (None, None),
    buffers: Buffers = None,
) -> tuple[RowTerms, TokenStatistics]:
    """Return the statistics of some rows, and the terms of their gradient.

    Args:
        logits: Logits of the student over the temperature, finite, shape ``(n, V)``.
        teacher_logits: The same of the teacher, or ``None`` without a teacher.
        targets: Sampled tokens, shape ``(n,)``.
        which: The divergence; ``None`` for none.
        normalisers: Log-normalisers of student and teacher, ``(n, 1)``, if they are known.
        buffers: :data:`BUFFERS` work tensors of the shape of `logits`.
    """
    work: list[Tensor | None] = [*buffers] if buffers else [None] * BUFFERS
    into_a, into_q, into_b, into_p, into_x, scratch = work

    def dot(left: Tensor, right: Tensor) -> Tensor:
        # Not a matrix product, which a GPU may round to TF32.
        return torch.mul(left, right, out=scratch).sum(-1)

    at = targets.unsqueeze(-1)  # (n, 1)
    a = log_normalised(logits, normalisers[0], into_a)  # (n, V)
    q = torch.exp(a, out=into_q)  # (n, V)
    log_p_student, entropy_student = a.gather(-1, at).squeeze(-1), -dot(q, a)
    nothing = torch.full_like(log_p_student, torch.nan)
    if teacher_logits is None:
        statistics = TokenStatistics(nothing, log_p_student, nothing, entropy_student, nothing, nothing, nothing)
        return RowTerms(a, q, None, None, None, 0.0), statistics
    b = log_normalised(teacher_logits, normalisers[1], into_b)  # (n, V)
    p = torch.exp(b, out=into_p)  # (n, V)
    log_p_teacher, entropy_teacher = b.gather(-1, at).squeeze(-1), -dot(p, b)
    value, inner, mean, outer = nothing, None, None, None
    plain: Tensor | None = None  # only if it differs from the value
    scale: float | Tensor = 0.0
    own = 0.0
    partial = which if which is not None and which.partial(a.size(-1)) else None
    buckets: Buckets | None = None
    if partial is not None and partial.top_k is not None and partial.top_k < a.size(-1):
        value, plain, buckets = bucket_gradient(a, b, q, p, partial, partial.top_k)
    elif partial is not None:
        value, plain, outer = clipped_gradient(a, b, partial)
        scale = 1.0
    ratio = b.sub_(a).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # log p/q, in place of b
    kl = dot(p, ratio)  # (n,)
    if which is not None and partial is None:
        if which.greedy:
            likeliest = teacher_logits.argmax(-1, keepdim=True)  # (n, 1)
            value = -a.gather(-1, likeliest).squeeze(-1)
            certain = torch.zeros_like(a) if into_x is None else into_x.zero_()
            outer, scale, own = certain.scatter_(-1, likeliest, 1.0), -1.0, 1.0  # the forward KL from a certain teacher
        elif which.alpha == 0.0:
            # The divergence is a tensor of its own, because the objective may differentiate it.
            value, outer, scale, own = kl.clone(), p, -1.0, 1.0
        elif which.alpha == 1.0:
            inner, mean, scale = ratio, dot(q, ratio), -1.0
            value = -mean
            if which.softening is not None:
                plain = value
                log_m = torch.exp(ratio, out=into_x).add_(1).mul_(0.5).log_()  # log of the mixture over q
                rest = 1 - which.softening.student_fraction(0.5 * (kl - dot(p, log_m) - dot(q, log_m)))
                # The normaliser of T^(1-a) S^a is computed from T/S, so that nothing cancels where they agree.
                log_target = torch.mul(ratio, rest.unsqueeze(-1), out=into_x).add_(a)
                value, scale = rest * value + log_target.logsumexp(-1), -rest
        else:
            # log m/q is computed from p/q: near agreement its error is that of p/q, not that of two logarithms.
            inner = torch.exp(ratio, out=into_x).mul_(which.alpha).add_(1 - which.alpha).log_()
            mean, scale = dot(q, inner), -(1 - which.alpha)
            value = which.alpha * (kl - dot(p, inner)) + scale * mean
    statistics = TokenStatistics(value, log_p_student, log_p_teacher, entropy_student, entropy_teacher, kl,
                                 value.clone() if plain is None else plain)  # fmt: skip
    return RowTerms(a, q, inner, mean, outer, scale, buckets, own), statistics


def logit_gradient(
    terms: RowTerms,
    statistics: TokenStatistics,
    targets: Tensor,
    derivatives: Coefficients,
    slope: Tensor | float,
    out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the loss with respect to the raw logits, shape ``(n, V)``. Overwrites the tensors in `terms`.

    Args:
        terms: From :func:`row_statistics` for these rows.
        statistics: From :func:`row_statistics` for these rows.
        targets: Sampled tokens, shape ``(n,)``.
        derivatives: Derivatives of the loss with respect to the statistics.
        slope: Derivative of the logits over the temperature with respect to the raw logits.
        out: Tensor that receives the gradient.
    """
    a, q, inner, mean, outer, scale, buckets, own = terms
    constant = torch.zeros_like(statistics.log_p_student)  # the part of x that does not depend on the token, (n,)
    x: Tensor | None = None
    if derivatives.divergence is not None and inner is not None and mean is not None:
        d_x = derivatives.divergence * scale
        x = inner.mul_(d_x.unsqueeze(-1))
        constant = constant - d_x * mean
    if derivatives.divergence is not None and own:
        constant = constant + own * derivatives.divergence
    if derivatives.log_p is not None:
        constant = constant - derivatives.log_p
    if derivatives.entropy is not None:
        constant = constant - derivatives.entropy * statistics.entropy_student
        a = a.mul_(-derivatives.entropy.unsqueeze(-1))
        x = a if x is None else x.add_(a)
    kept: Tensor | None = None
    if derivatives.divergence is not None and buckets is not None:
        # The entries of kept tokens are replaced: where the tail's factor is large, a correction would cancel digits.
        inside = constant.unsqueeze(-1)
        if derivatives.entropy is not None:
            inside = inside - derivatives.entropy.unsqueeze(-1) * buckets.a
        kept = buckets.a.exp().mul_(inside).addcmul_(buckets.gradient, derivatives.divergence.unsqueeze(-1))  # (n, k)
        constant = constant + derivatives.divergence * buckets.rest
    constant = constant.unsqueeze(-1)  # (n, 1)
    gradient = torch.mul(q, constant if x is None else x.add_(constant), out=out)  # (n, V)
    if derivatives.divergence is not None and outer is not None:
        gradient.addcmul_(outer, (derivatives.divergence * scale).unsqueeze(-1))
    if kept is not None and buckets is not None:
        gradient.scatter_(-1, buckets.kept, kept)
    if derivatives.log_p is not None:
        gradient.scatter_add_(-1, targets.unsqueeze(-1), derivatives.log_p.unsqueeze(-1))
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


class Normalisation(NamedTuple):
    """Sums over the vocabulary that the gradient needs again, each ``(n, 1)`` or ``(n,)``, and the gradient over buckets."""

    student: Tensor
    teacher: Tensor | None
    mean: Tensor | None
    buckets: Buckets | None


def statistics_of(
    logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, which: Divergence | None
) -> tuple[TokenStatistics, Normalisation]:
    """Return statistics and sums of some rows, but no tensor of the size of the logits. Meant for torch.compile."""
    student = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    teacher = None if teacher_logits is None else teacher_logits.logsumexp(-1, keepdim=True)
    terms, statistics = row_statistics(logits, teacher_logits, targets, which, (student, teacher))
    return statistics, Normalisation(student, teacher, terms.mean, terms.buckets)


def gradient_of(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    which: Divergence | None,
    statistics: TokenStatistics,
    sums: Normalisation,
    derivatives: Coefficients,
    slope: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient in the raw logits, computed from the logits alone. Meant for torch.compile.

    Fused into one pass over both logits, recomputing the common terms costs less than storing them.
    """
    again = which if sums.buckets is None else None  # the selection of tokens is not repeated
    terms, _ = row_statistics(logits, teacher_logits, targets, again, (sums.student, sums.teacher))
    terms = terms._replace(mean=sums.mean, buckets=sums.buckets)
    return logit_gradient(terms, statistics, targets, derivatives, slope).to(dtype)
