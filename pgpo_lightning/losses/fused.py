"""The loss and its gradient from hidden states in one pass, without holding the logits of more than one chunk of tokens.

Every objective here has a closed form for its gradient in the logits. So the gradient is computed while the chunk's logits are in
memory, and turned into gradients of hidden states and head at once: four matrix products of N x V x D, none recomputed.
This works because the loss is ``sum_i c_i loss_i`` with coefficients ``c_i`` that carry no gradient. The coefficients may depend
on the token's own statistics (importance weights, clipping), because the objective is called between the two halves of a chunk:
after the statistics, before the gradient.

Notation: q student, p teacher, a = log q, b = log p, z the student's logits divided by the temperature.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgpo_lightning.core.devices import is_gpu
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
from pgpo_lightning.losses.logits import Head, Product, Source, mixed_logits, scale_logits

__all__ = ["Head", "Objective", "Source", "TokenStatistics", "linear_distillation", "linear_statistics"]

_CPU_CHUNK_ROWS = 256
# Bytes of the fp32 logits of one model in a chunk on a CPU: 138 rows of 151,936 tokens, which are as fast as 256.
_CPU_CHUNK_BYTES = 80 * 2**20
_CHUNK_ROWS = 1024  # keeps the accumulation of the head's gradient compute-bound on current GPUs
# Bytes of one fp32 block of rows in elementwise work. On a CPU it stays in the cache.
_BLOCK_BYTES, _CPU_BLOCK_BYTES = 2**26, 2**20


Objective = Callable[[TokenStatistics, slice], Tensor]
"""From the statistics of some tokens, and which tokens of the call they are, to a loss per token ``(n,)``.

Only `divergence`, `log_p_student` and `entropy_student` may be differentiated; everything else is data. The objective must be
pointwise: the loss of a token depends on that token's statistics alone.
"""


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
        student: Hidden states ``(N, D)`` at the positions that predict the response tokens, and the student's head. Each of the
            two gets a gradient if it requires one.
        teacher: The teacher's sources for the same tokens in the same order; empty without a teacher.
        targets: The response tokens, shape ``(N,)``, int64.
        objective: From statistics to a loss per token.
        which: The divergence; ``None`` if the objective does not use it.
        temperature: Logits of student and teacher are divided by it: the temperature at which the rollouts were sampled.
        chunk_rows: Tokens whose logits are held at a time; ``None`` for the number of :func:`rows_at_once`.
        compiled: Whether torch.compile fuses the elementwise work. ``None`` means on GPUs only, where that work is a third of
            the time. On a CPU compilation pays off only in long runs with constant sizes.

    Returns:
        A scalar that can be differentiated once, and statistics without gradient.

    Raises:
        RuntimeError: On a second backward pass.
    """
    chunks = _Chunks(student.head, teacher, targets, which, temperature, chunk_rows, compiled)
    loss, *values = _Loss.apply(student.hidden, student.head.weight, chunks, objective)
    return loss, TokenStatistics(*values)


def rows_at_once(device: str, vocabulary: int) -> tuple[int, int]:
    """Return the tokens of a chunk, whose logits are held at a time, and of a block of elementwise work in it.

    Args:
        device: Type of the device.
        vocabulary: V. On a CPU more than 82,000 tokens reduce the chunk, because its logits would take most of the memory.
    """
    block = max(1, (_CPU_BLOCK_BYTES if device == "cpu" else _BLOCK_BYTES) // (4 * vocabulary))
    if device != "cpu":
        return _CHUNK_ROWS, block
    return max(block, min(_CPU_CHUNK_ROWS, _CPU_CHUNK_BYTES // (4 * vocabulary))), block


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

    It serves losses that are not pointwise, for example with a weight that depends on the whole sequence. The backward pass
    computes the logits again: six instead of four matrix products of N x V x D. Memory is the same, less the two gradients that
    :func:`linear_distillation` keeps. The arguments are described there.
    """
    chunks = _Chunks(student.head, teacher, targets, which, temperature, chunk_rows, compiled)
    return TokenStatistics(*_Statistics.apply(student.hidden, student.head.weight, chunks))


class _Loss(torch.autograd.Function):
    """Computes the gradient in the forward pass, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, chunks: "_Chunks", objective: Objective
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[:2]
        total: list[Tensor] = []

        def coefficients(tokens: TokenStatistics, part: slice) -> Coefficients | None:
            loss, derivatives = _differentiate(objective, tokens, part, wants_gradient=any(wanted))
            total.append(loss)
            return derivatives

        statistics, ctx.gradients = chunks.run(hidden, head_weight, coefficients, wanted)
        loss = torch.stack(total).sum() if total else statistics.kl.sum()  # zero for no tokens
        ctx.dtypes = (hidden.dtype, head_weight.dtype)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "Expected one backward pass, but got a second: the first has used up the gradients of this loss."
            )
        gradients = [
            gradient if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *gradients, None, None


class _Statistics(torch.autograd.Function):
    """Computes the gradient in the backward pass, from logits that are computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, chunks: "_Chunks") -> tuple[Tensor, ...]:
        statistics, _ = chunks.run(hidden, head_weight)
        ctx.save_for_backward(hidden, head_weight)
        ctx.chunks = chunks
        data = (statistics.log_p_teacher, statistics.entropy_teacher, statistics.kl, statistics.plain)
        ctx.mark_non_differentiable(*data)
        ctx.set_materialize_grads(False)
        return tuple(statistics)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_divergence: Tensor | None, d_log_p: Tensor | None, _: None, d_entropy: Tensor | None, *__: None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight = ctx.saved_tensors
        upstream = Coefficients(d_divergence, d_log_p, d_entropy)
        if all(values is None for values in upstream):
            return None, None, None

        def coefficients(_: TokenStatistics, part: slice) -> Coefficients:
            return Coefficients(*(None if values is None else values[part] for values in upstream))

        _, gradients = ctx.chunks.run(hidden, head_weight, coefficients, ctx.needs_input_grad[:2])
        return *(
            None if gradient is None else gradient.to(matrix.dtype)
            for gradient, matrix in zip(gradients, (hidden, head_weight), strict=True)
        ), None


def _differentiate(
    objective: Objective, tokens: TokenStatistics, part: slice, wants_gradient: bool
) -> tuple[Tensor, Coefficients | None]:
    """Return the summed loss of some tokens and, if wanted, its derivatives with respect to their statistics."""
    leaves = [tokens.divergence, tokens.log_p_student, tokens.entropy_student]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_(wants_gradient)
        loss = objective(tokens, part).sum()
    if not wants_gradient:
        return loss.detach(), None
    derivatives = Coefficients(*torch.autograd.grad(loss, leaves, allow_unused=True))
    for leaf in leaves:
        leaf.requires_grad_(False)
    return loss.detach(), derivatives


@dataclass
class _Chunks:
    """The inputs of one call except the two matrices that may need a gradient."""

    head: Head
    teacher: list[Source]
    targets: Tensor
    which: Divergence | None
    temperature: float
    chunk_rows: int | None
    compiled: bool | None

    def __post_init__(self) -> None:
        # Decided here, because a backward pass runs outside of autocast.
        weight = self.head.weight
        self.product = Product(weight.dtype, weight.device.type)

    def run(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        coefficients: Callable[[TokenStatistics, slice], Coefficients | None] | None = None,
        wanted: tuple[bool, ...] = (False, False),
    ) -> tuple[TokenStatistics, tuple[Tensor | None, Tensor | None]]:
        """Compute statistics and gradients of all tokens, one chunk at a time.

        Args:
            hidden: Hidden states of the student, ``(N, D)``.
            head_weight: Weight of the student's head, ``(V, D)``.
            coefficients: Called for each block of tokens between its statistics and its gradient; ``None`` for no gradient.
            wanted: Whether the gradients of `hidden` and of `head_weight` are wanted.

        Returns:
            The statistics, and the two gradients (``None`` where not wanted).
        """
        device, n, vocabulary = hidden.device, self.targets.numel(), head_weight.size(0)
        product = self.product
        shape = (len(TokenStatistics._fields), n)
        statistics = TokenStatistics(*torch.full(shape, torch.nan, dtype=product.wide, device=device).unbind())
        d_hidden = torch.zeros(hidden.shape, dtype=product.wide, device=device) if wanted[0] else None
        d_head = torch.zeros(head_weight.shape, dtype=product.wide, device=device) if wanted[1] else None
        fused = (is_gpu(device) and _compiles(device.type)) if self.compiled is None else self.compiled
        chunk_rows, block = rows_at_once(device.type, vocabulary)
        chunk_rows = self.chunk_rows or chunk_rows
        block = min(block, chunk_rows, max(1, n))
        buffers = []
        if not fused:
            shape = (block, vocabulary)
            buffers = [torch.empty(shape, dtype=product.wide, device=device) for _ in range(BUFFERS)]
        # Autocast would narrow the logits, and would cast the heads again for every chunk.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            weight = product.operand(head_weight)
            teachers = [(source, product.operand(source.head.weight)) for source in self.teacher]
            for start in range(0, n, chunk_rows):
                chunk = slice(start, min(n, start + chunk_rows))
                h = product.operand(hidden[chunk])  # (chunk, D)
                logits = product(h, weight.t())  # (chunk, V)
                teacher_logits = mixed_logits(teachers, chunk, product)  # (chunk, V)
                if teacher_logits is not None and self.temperature != 1.0:
                    teacher_logits.div_(self.temperature)
                if fused:
                    d_logits = self._fused(logits, teacher_logits, chunk, statistics, coefficients)
                else:
                    for first in range(start, chunk.stop, block):
                        part = slice(first, min(chunk.stop, first + block))
                        inside = slice(first - start, part.stop - start)
                        teacher_part = None if teacher_logits is None else teacher_logits[inside]
                        self._block(logits[inside], teacher_part, part, statistics, coefficients, buffers)
                        del teacher_part  # a view that would keep the teacher's logits alive
                    # `_block` has overwritten the logits with their gradient.
                    d_logits = product.gradient(logits) if any(wanted) else None
                if d_hidden is not None and d_logits is not None:
                    d_hidden[chunk] = product(d_logits, weight)
                if d_head is not None and d_logits is not None:
                    product.add(d_head, d_logits.t(), h)
                del logits, teacher_logits, d_logits  # before the logits of the next chunk are allocated
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
        """Fill in the statistics of a block of tokens, and overwrite their logits with the gradient."""
        z, slope = scale_logits(logits, self.head, self.temperature)
        targets = self.targets[part]
        buffers = [buffer[: len(targets)] for buffer in buffers]
        terms, block = row_statistics(z, teacher_logits, targets, self.which, buffers=buffers)
        for whole, values in zip(statistics, block, strict=True):
            whole[part] = values
        if coefficients is not None and (derivatives := coefficients(block, part)) is not None:
            logit_gradient(terms, block, targets, derivatives, slope, out=logits)

    def _fused(
        self,
        logits: Tensor,
        teacher_logits: Tensor | None,
        part: slice,
        statistics: TokenStatistics,
        coefficients: Callable[[TokenStatistics, slice], Coefficients | None] | None,
    ) -> Tensor | None:
        """Fill in the statistics of a whole chunk, and return the gradient with respect to its raw logits."""
        z, slope = scale_logits(logits, self.head, self.temperature)
        targets = self.targets[part]
        chunk, sums = _compiled(statistics_of)(z, teacher_logits, targets, self.which)
        for whole, values in zip(statistics, chunk, strict=True):
            whole[part] = values
        if coefficients is None or (derivatives := coefficients(chunk, part)) is None:
            return None
        gradient, dtype = _compiled(gradient_of), self.product.operand_type
        return gradient(z, teacher_logits, targets, self.which, chunk, sums, derivatives, slope, dtype)


@functools.cache
def _compiles(device: str) -> bool:
    """Whether torch.compile works here. It needs a C compiler, which slim images lack."""
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
