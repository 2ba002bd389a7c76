"""The loss and its gradient from hidden states in one pass, without the logits of more than one chunk.

The gradient with respect to the logits has a closed form for every objective here, so it is made while the chunk's logits are at
hand and turned into gradients of hidden states and head at once: eight matrix products of N x V x D in all, none recomputed.
What makes this possible is that the loss is ``sum_i c_i loss_i`` with coefficients that carry no gradient themselves; they may
depend on the token's own statistics (importance weights, clipping), because they are asked for between the two halves of a chunk.

Notation: q student, p teacher, a = log q, b = log p, z the student's logits over the temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgpo_lightning.divergence import MAX_LOG_RATIO, Divergence, divergence_and_gradient

_CACHE_BYTES = 2**20  # of one fp32 block of rows on a CPU: elementwise work stays in the second-level cache
_CPU_CHUNK_ROWS = 256
_CHUNK_ROWS = 1024  # keeps the accumulation of the head's gradient compute-bound on current GPUs


class TokenStatistics(NamedTuple):
    """One value per response token, each of shape ``(N,)``, fp32 (fp64 for fp64 hidden states), without gradient.

    Teacher values are NaN without a teacher. Entropies, `kl` (teacher from student) and log-probabilities are in nats, over the
    full vocabulary.
    """

    divergence: Tensor
    log_p_student: Tensor
    log_p_teacher: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    kl: Tensor


Objective = Callable[[TokenStatistics, slice], Tensor]
"""Statistics of some tokens, and which tokens of the call they are, to a loss per token ``(n,)``.

`divergence`, `log_p_student` and `entropy_student` may be differentiated; everything else is data. It must be pointwise: the
loss of a token depends on that token's statistics alone.
"""


@dataclass
class Head:
    """A language-model head: ``softcap(scale * hidden @ weight.T)``.

    Args:
        weight: The output embedding, shape ``(V, D)``.
        scale: Of the logits (Cohere, Granite).
        softcap: ``cap * tanh(logits / cap)`` (Gemma); ``None`` for none.
    """

    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., V)`` of hidden states ``(..., D)``."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass
class Source:
    """Where logits come from: ``weight * head(hidden)``.

    Several sources add up, which is how the trust-region teacher mixes two models (SDPO's trust region).
    """

    hidden: Tensor
    head: Head
    weight: float = 1.0


def linear_distillation(
    student: Source,
    teacher: list[Source],
    targets: Tensor,
    objective: Objective,
    which: Divergence | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """Return the summed loss of all response tokens and their statistics.

    Args:
        student: Hidden states ``(N, D)`` at the positions that predict the response tokens, and the student's head. Those of
            the two that require a gradient get one.
        teacher: The teacher's sources for the same tokens in the same order; empty if there is none.
        targets: The response tokens, shape ``(N,)``, int64.
        objective: From statistics to a loss per token.
        which: The divergence; ``None`` where the objective does not ask for it.
        temperature: Logits of both are divided by it; the temperature at which the rollouts were sampled.
        chunk_rows: Tokens whose logits are held at a time.

    Returns:
        A scalar that can be differentiated once, and statistics without gradient.
    """
    loss, *values = _LinearDistillation.apply(
        student.hidden, student.head.weight, student.head, teacher, targets, objective, which, temperature, chunk_rows
    )
    return loss, TokenStatistics(*values)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head: Head,
        teacher: list[Source],
        targets: Tensor,
        objective: Objective,
        which: Divergence | None,
        temperature: float,
        chunk_rows: int | None,
    ) -> tuple[Tensor, ...]:
        device = hidden.device
        n, vocabulary = targets.numel(), head_weight.size(0)
        product = _Product(head_weight.dtype, device.type)
        if device.type == "cpu":
            block = max(1, _CACHE_BYTES // (4 * vocabulary))
            rows = chunk_rows or max(_CPU_CHUNK_ROWS, block)
        else:
            rows = block = chunk_rows or _CHUNK_ROWS
        statistics = TokenStatistics(
            *(torch.full((n,), torch.nan, dtype=product.wide, device=device) for _ in range(6))
        )
        loss = torch.zeros((), dtype=product.wide, device=device)
        d_hidden, d_head = (
            torch.zeros(matrix.shape, dtype=product.wide, device=device) if wanted else None
            for matrix, wanted in zip((hidden, head_weight), ctx.needs_input_grad, strict=False)
        )
        trains = d_hidden is not None or d_head is not None
        # Autocast would narrow the logits, and cast the heads again for every chunk.
        with torch.autocast(device.type, enabled=False):
            weight = product.operand(head_weight)
            teachers = [(source, product.operand(source.head.weight)) for source in teacher]
            for start in range(0, n, rows):
                chunk = slice(start, min(n, start + rows))
                h = product.operand(hidden[chunk])
                logits = product(h, weight.t())
                teacher_logits = _mixture(teachers, chunk, product)
                for first in range(start, chunk.stop, block):
                    part = slice(first, min(chunk.stop, first + block))
                    inside = slice(first - start, part.stop - start)
                    z, slope = _finish(logits[inside], head, temperature)
                    a = z.log_softmax(-1)
                    b = None if teacher_logits is None else (teacher_logits[inside] / temperature).log_softmax(-1)
                    value, gradient = _rows(a, b, targets[part], part, objective, which, statistics, trains)
                    loss += value
                    if trains:
                        torch.mul(gradient, slope, out=logits[inside])
                if trains:
                    d_logits = product.operand(logits)
                    if d_hidden is not None:
                        d_hidden[chunk] = product(d_logits, weight)
                    if d_head is not None:
                        product.add(d_head, d_logits.t(), h)
        ctx.gradients = (d_hidden, d_head)
        ctx.dtypes = (hidden.dtype, head_weight.dtype)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("Expected one backward pass, but the gradients of this loss are used up by the first.")
        gradients = [
            gradient if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *gradients, *[None] * 7


class _Product:
    """Matrix products of narrow operands with wide results.

    Logits rounded to bf16 put 3e-4 nats under every divergence, and a head's gradient summed in bf16 loses what is small.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        # Only CUDA multiplies narrow matrices into wide ones. Elsewhere the operands are rounded, then widened.
        self.native = device == "cuda" and self.narrow in (torch.bfloat16, torch.float16)

    def operand(self, matrix: Tensor) -> Tensor:
        rounded = matrix.to(self.narrow)
        return rounded if self.native else rounded.to(self.wide)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out_dtype=self.wide) if self.native else left @ right

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if self.native:
            total += self(left, right)
        else:
            total.addmm_(left, right)


def _mixture(teachers: list[tuple[Source, Tensor]], chunk: slice, product: _Product) -> Tensor | None:
    """Return the teacher's logits of a chunk, or ``None`` without a teacher."""
    logits = None
    for source, weight in teachers:
        term, _ = _finish(product(product.operand(source.hidden[chunk]), weight.t()), source.head, 1.0)
        logits = term.mul_(source.weight) if logits is None else logits.add_(term, alpha=source.weight)
    return logits


def _finish(logits: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor | float]:
    """Scale, cap and cool raw logits in place; return them, and their derivative with respect to the raw ones."""
    slope: Tensor | float = head.scale / temperature
    if head.softcap is None:
        return (logits if slope == 1.0 else logits.mul_(slope)), slope
    tanh = logits.mul_(head.scale / head.softcap).tanh_()
    slope = tanh.square().neg_().add_(1).mul_(slope)
    return tanh.mul_(head.softcap / temperature), slope


def _rows(
    a: Tensor,
    b: Tensor | None,
    targets: Tensor,
    part: slice,
    objective: Objective,
    which: Divergence | None,
    statistics: TokenStatistics,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fill in the statistics of some rows; return their loss and its gradient with respect to the logits."""
    at = targets.unsqueeze(-1)
    q = a.exp()
    finite_a = a.clamp(min=torch.finfo(a.dtype).min)  # a masked vocabulary entry is -inf, and 0 * inf is not 0
    statistics.log_p_student[part] = a.gather(-1, at).squeeze(-1)
    statistics.entropy_student[part] = -(q * finite_a).sum(-1)
    d_divergence = None
    if b is not None:
        p = b.exp()
        finite_b = b.clamp(min=torch.finfo(b.dtype).min)
        statistics.log_p_teacher[part] = b.gather(-1, at).squeeze(-1)
        statistics.entropy_teacher[part] = -(p * finite_b).sum(-1)
        statistics.kl[part] = (p * (finite_b - finite_a).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)).sum(-1)
        if which is not None:
            statistics.divergence[part], d_divergence = divergence_and_gradient(finite_a, finite_b, which)
    mine = TokenStatistics(*(values[part].clone() for values in statistics))
    leaves = [mine.divergence, mine.log_p_student, mine.entropy_student]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_(wants_gradient)
        loss = objective(mine, part).sum()
    if not wants_gradient:
        return loss.detach(), None
    by_divergence, by_log_p, by_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradient = torch.zeros_like(a)
    if by_divergence is not None and d_divergence is not None:
        gradient = d_divergence.mul_(by_divergence.unsqueeze(-1))
    if by_log_p is not None:
        gradient.addcmul_(q, by_log_p.unsqueeze(-1), value=-1).scatter_add_(-1, at, by_log_p.unsqueeze(-1))
    if by_entropy is not None:
        gradient.addcmul_(
            q * (finite_a + mine.entropy_student.detach().unsqueeze(-1)), by_entropy.unsqueeze(-1), value=-1
        )
    return loss.detach(), gradient
