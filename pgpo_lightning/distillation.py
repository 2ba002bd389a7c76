"""From hidden states to per-token loss terms, a chunk of tokens at a time.

The logits of student and teacher dominate memory: with 152k tokens of vocabulary each fp32 copy for 8192 positions takes
5 GB. So neither is ever whole: a chunk's logits live in the forward pass of that chunk, and again in its backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pgpo_lightning.divergence import entropy, forward_kl

Head = Callable[[Tensor], Tensor]
"""Hidden states ``(N, D)`` to logits ``(N, V)``."""

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student and teacher log-probabilities ``(N, V)`` and sampled tokens ``(N,)`` to a loss per token ``(N,)``."""


@dataclass
class Source:
    """Where a teacher's logits come from: ``weight * head(hidden)``.

    Several sources add up, which is how the trust-region teacher mixes two models (sdpo.md section 4).
    """

    hidden: Tensor
    head: Head
    weight: float = 1.0


class TokenStatistics(NamedTuple):
    """One value per response token, each of shape ``(N,)`` and fp32 (fp64 for fp64 hidden states).

    `loss` and `log_p_student` carry gradients to the student; the others carry none. Teacher values are NaN without a
    teacher. Entropies, `kl` (teacher from student) and log-probabilities are in nats, over the full vocabulary.
    """

    loss: Tensor
    log_p_student: Tensor
    log_p_teacher: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    kl: Tensor


def token_statistics(
    student: Source,
    teacher: Sequence[Source],
    targets: Tensor,
    token_loss: TokenLoss | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = 2**28,
) -> TokenStatistics:
    """Compare student and teacher at every response token.

    Args:
        student: Hidden states ``(N, D)`` at the positions that predict the response tokens, and the student's head.
        teacher: The teacher's sources for the same tokens in the same order; empty if there is none.
        targets: The response tokens, shape ``(N,)``, int64.
        token_loss: The loss per token from full log-probabilities; needs a teacher. Without it `loss` is zero.
        temperature: Logits of both are divided by it; the temperature at which the rollouts were sampled.
        chunk_bytes: Size that one copy of a chunk's logits may take. Smaller saves memory, and costs nothing to speak of
            as long as a chunk keeps the matrix product busy.

    Returns:
        One value per token, in the order of `targets`.
    """

    def chunk(student_hidden: Tensor, targets: Tensor, *teacher_hidden: Tensor) -> tuple[Tensor, ...]:
        log_s = _log_softmax(student.head(student_hidden), temperature)
        log_s_y = log_s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        unknown = torch.full_like(log_s_y, torch.nan).detach()
        with torch.no_grad():
            entropy_s = entropy(log_s)
            if not teacher_hidden:
                return torch.zeros_like(unknown), log_s_y, unknown, entropy_s, unknown, unknown
            logits = sum(source.weight * source.head(h) for source, h in zip(teacher, teacher_hidden, strict=True))
            log_t = _log_softmax(logits, temperature)
            log_t_y = log_t.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            entropy_t, kl = entropy(log_t), forward_kl(log_s, log_t)
        loss = token_loss(log_s, log_t, targets) if token_loss is not None else torch.zeros_like(unknown)
        return loss, log_s_y, log_t_y, entropy_s, entropy_t, kl

    inputs = (student.hidden, targets, *(source.hidden for source in teacher))
    with torch.no_grad():
        vocabulary = student.head(student.hidden[:1]).size(-1)
    size = max(1, chunk_bytes // (4 * vocabulary))
    if targets.numel() <= size:
        return TokenStatistics(*chunk(*inputs))
    parts = [
        checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(tensor.split(size) for tensor in inputs), strict=True)
    ]
    return TokenStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Logits in bf16 put a floor of about 3e-4 nats under every divergence; the softmax at least is exact.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(-1) if temperature != 1.0 else wide.log_softmax(-1)
