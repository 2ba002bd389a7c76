"""The loss and its gradient from hidden states in one pass, without the logits of more than one chunk.

The gradient with respect to the logits has a closed form for every objective here, so it is made while the chunk's logits are at
hand and turned into gradients of hidden states and head at once: eight matrix products of N x V x D in all, none recomputed.
What makes this possible is that the loss is ``sum_i c_i loss_i`` with coefficients that carry no gradient themselves; they may
depend on the token's own statistics (importance weights, clipping), because they are asked for between the two halves of a chunk.

Notation: q student, p teacher, a = log q, b = log p, z the student's logits over the temperature.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused_backward import (
    BUFFERS,
    Coefficients,
    TokenStatistics,
    gradient_of,
    logit_gradient,
    row_statistics,
    statistics_of,
)

__all__ = ["Head", "Objective", "Source", "TokenStatistics", "linear_distillation", "linear_statistics"]

_CPU_CHUNK_ROWS = 256
_CHUNK_ROWS = 1024  # keeps the accumulation of the head's gradient compute-bound on current GPUs
_BLOCK_BYTES = {
    "cpu": 2**20,
    "cuda": 2**26,
}  # of one fp32 block of rows in elementwise work; on a CPU it stays in the cache


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
    compiled: bool | None = None,
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
        chunk_rows: Tokens whose logits are held at a time; null for 1024, on a CPU at least 256.
        compiled: Whether torch.compile fuses the elementwise work; null for: on a GPU, where it is a third of the time.
            Elsewhere it pays for itself only in long runs at one size.

    Returns:
        A scalar that can be differentiated once, and statistics without gradient.
    """
    over = _Chunks(student.head, teacher, targets, which, temperature, chunk_rows, compiled)
    loss, *values = _Loss.apply(student.hidden, student.head.weight, over, objective)
    return loss, TokenStatistics(*values)


def linear_statistics(
    student: Source,
    teacher: list[Source],
    targets: Tensor,
    which: Divergence | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    compiled: bool | None = None,
) -> TokenStatistics:
    """Return statistics of which `divergence`, `log_p_student` and `entropy_student` can be differentiated.

    For losses that are not pointwise: a weight that depends on the whole sequence, say. The logits are computed a second time
    in the backward pass, 12 instead of 8 matrix products of N x V x D; memory is the same, less the two gradients that
    :func:`linear_distillation` keeps. Arguments as there.
    """
    over = _Chunks(student.head, teacher, targets, which, temperature, chunk_rows, compiled)
    return TokenStatistics(*_Statistics.apply(student.hidden, student.head.weight, over))


class _Loss(torch.autograd.Function):
    """The gradient is made in the forward pass, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, over: "_Chunks", objective: Objective
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[:2]
        total: list[Tensor] = []

        def coefficients(tokens: TokenStatistics, part: slice) -> Coefficients | None:
            loss, by = _differentiate(objective, tokens, part, wants_gradient=any(wanted))
            total.append(loss)
            return by

        statistics, ctx.gradients = over.run(hidden, head_weight, coefficients, wanted)
        loss = torch.stack(total).sum() if total else statistics.kl.sum()  # no token: zero
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
        return *gradients, None, None


class _Statistics(torch.autograd.Function):
    """The gradient is made in the backward pass, from logits that are computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, over: "_Chunks") -> tuple[Tensor, ...]:
        statistics, _ = over.run(hidden, head_weight)
        ctx.save_for_backward(hidden, head_weight)
        ctx.over = over
        data = (statistics.log_p_teacher, statistics.entropy_teacher, statistics.kl, statistics.plain)
        ctx.mark_non_differentiable(*data)
        ctx.set_materialize_grads(False)
        return tuple(statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, by_divergence: Tensor | None, by_log_p: Tensor | None, _: None, by_entropy: Tensor | None, *__: None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight = ctx.saved_tensors
        upstream = Coefficients(by_divergence, by_log_p, by_entropy)
        if all(values is None for values in upstream):
            return None, None, None

        def coefficients(_: TokenStatistics, part: slice) -> Coefficients:
            return Coefficients(*(None if values is None else values[part] for values in upstream))

        _, gradients = ctx.over.run(hidden, head_weight, coefficients, ctx.needs_input_grad[:2])
        return *(
            None if gradient is None else gradient.to(matrix.dtype)
            for gradient, matrix in zip(gradients, (hidden, head_weight), strict=True)
        ), None


def _differentiate(
    objective: Objective, tokens: TokenStatistics, part: slice, wants_gradient: bool
) -> tuple[Tensor, Coefficients | None]:
    """Return the loss of some tokens and, if wanted, its derivatives by their statistics."""
    leaves = [tokens.divergence, tokens.log_p_student, tokens.entropy_student]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_(wants_gradient)
        loss = objective(tokens, part).sum()
    if not wants_gradient:
        return loss.detach(), None
    by = Coefficients(*torch.autograd.grad(loss, leaves, allow_unused=True))
    for leaf in leaves:
        leaf.requires_grad_(False)
    return loss.detach(), by


@dataclass
class _Chunks:
    """Everything about one call but the two matrices that may need a gradient."""

    head: Head
    teacher: list[Source]
    targets: Tensor
    which: Divergence | None
    temperature: float
    chunk_rows: int | None
    compiled: bool | None

    def __post_init__(self) -> None:
        # Here, because a backward pass runs outside of autocast.
        weight = self.head.weight
        self.product = _Product(weight.dtype, weight.device.type)

    def run(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        coefficients: Callable[[TokenStatistics, slice], Coefficients | None] | None = None,
        wanted: tuple[bool, ...] = (False, False),
    ) -> tuple[TokenStatistics, tuple[Tensor | None, Tensor | None]]:
        """Go over all tokens, a chunk at a time.

        Args:
            hidden: Of the student, ``(N, D)``.
            head_weight: Of the student, ``(V, D)``.
            coefficients: Asked for each block of tokens between its statistics and its gradient; ``None`` for no gradient.
            wanted: Whether gradients of the two are wanted.
        """
        device, n, vocabulary = hidden.device, self.targets.numel(), head_weight.size(0)
        product = self.product
        like = {"dtype": product.wide, "device": device}
        statistics = TokenStatistics(*torch.full((len(TokenStatistics._fields), n), torch.nan, **like).unbind())
        d_hidden = torch.zeros(hidden.shape, **like) if wanted[0] else None
        d_head = torch.zeros(head_weight.shape, **like) if wanted[1] else None
        fused = (device.type == "cuda" and _compiles(device.type)) if self.compiled is None else self.compiled
        block = max(1, _BLOCK_BYTES.get(device.type, 2**26) // (4 * vocabulary))
        chunk_rows = self.chunk_rows or (max(_CPU_CHUNK_ROWS, block) if device.type == "cpu" else _CHUNK_ROWS)
        block = min(block, chunk_rows, max(1, n))
        buffers = [] if fused else [torch.empty(block, vocabulary, **like) for _ in range(BUFFERS)]
        # Autocast would narrow the logits, and cast the heads again for every chunk.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            weight = product.operand(head_weight)
            teachers = [(source, product.operand(source.head.weight)) for source in self.teacher]
            for start in range(0, n, chunk_rows):
                chunk = slice(start, min(n, start + chunk_rows))
                h = product.operand(hidden[chunk])
                logits = product(h, weight.t())
                teacher_logits = _mixture(teachers, chunk, product)
                if teacher_logits is not None and self.temperature != 1.0:
                    teacher_logits.div_(self.temperature)
                if fused:
                    d_logits = self._fused(logits, teacher_logits, chunk, statistics, coefficients)
                else:
                    for first in range(start, chunk.stop, block):
                        part = slice(first, min(chunk.stop, first + block))
                        inside = slice(first - start, part.stop - start)
                        theirs = None if teacher_logits is None else teacher_logits[inside]
                        self._block(logits[inside], theirs, part, statistics, coefficients, buffers)
                    d_logits = product.gradient(logits) if any(wanted) else None
                if d_hidden is not None:
                    d_hidden[chunk] = product(d_logits, weight)
                if d_head is not None:
                    product.add(d_head, d_logits.t(), h)
                logits = teacher_logits = theirs = d_logits = None  # or the next chunk's would stand beside them
        return statistics, (d_hidden, d_head)

    def _block(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        part: slice,
        statistics: TokenStatistics,
        coefficients: Callable[[TokenStatistics, slice], Coefficients | None] | None,
        buffers: list[Tensor],
    ) -> None:
        """Fill in the statistics of some tokens; put the gradient in place of their logits."""
        z, slope = _finish(logits, self.head, self.temperature)
        targets = self.targets[part]
        buffers = [buffer[: len(targets)] for buffer in buffers]
        made, mine = row_statistics(z, teacher_logits, targets, self.which, buffers=buffers)
        for everyone, here in zip(statistics, mine, strict=True):
            everyone[part] = here
        if coefficients is not None and (by := coefficients(mine, part)) is not None:
            logit_gradient(made, mine, targets, by, slope, out=logits)

    def _fused(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        part: slice,
        statistics: TokenStatistics,
        coefficients: Callable[[TokenStatistics, slice], Coefficients | None] | None,
    ) -> Tensor | None:
        """Fill in the statistics of a whole chunk; return the gradient with respect to its logits."""
        z, slope = _finish(logits, self.head, self.temperature)
        targets = self.targets[part]
        mine, sums = _compiled(statistics_of)(z, teacher_logits, targets, self.which)
        for everyone, here in zip(statistics, mine, strict=True):
            everyone[part] = here
        if coefficients is None or (by := coefficients(mine, part)) is None:
            return None
        gradient = _compiled(gradient_of)
        return gradient(z, teacher_logits, targets, self.which, mine, sums, by, slope, self.product.operand_type)


@functools.cache
def _compiles(device: str) -> bool:
    """Whether torch.compile works here; it needs a C compiler, which slim images lack."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as error:
        warnings.warn(f"torch.compile fails here, so the loss takes up to twice as long: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its elementwise work fused, for any number of rows."""
    return torch.compile(function, dynamic=True)


class _Product:
    """Matrix products of narrow operands with wide results.

    Logits rounded to bf16 put 3e-4 nats under every divergence, and a head's gradient summed in bf16 loses what is small.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        # Only CUDA multiplies narrow matrices into wide ones. Elsewhere the operands are rounded, then widened; so they are
        # where that is fp16, in which the gradient of a logit, unscaled as it is here, would mostly be zero.
        self.native = device == "cuda" and self.narrow == torch.bfloat16
        self.operand_type = self.narrow if self.native else self.wide

    def operand(self, matrix: Tensor) -> Tensor:
        rounded = matrix.to(self.narrow)
        return rounded if self.native else rounded.to(self.wide)

    def gradient(self, matrix: Tensor) -> Tensor:
        return matrix if self.narrow == torch.float16 else self.operand(matrix)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out_dtype=self.wide) if self.native else left @ right

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if self.native:
            torch.addmm(total, left, right, out_dtype=self.wide, out=total)
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
