"""The information estimators on what is left of two distributions: rounded logits, or the student's likeliest tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo_lightning.losses.divergence import entropy, forward_kl, student_top_k
from pgpo_lightning.losses.fused_backward import TokenStatistics, row_statistics
from pgpo_lightning.losses.step_statistics import StepStatistics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class View:
    """What an estimator gets to see.

    Attributes:
        precision: Type that logits are rounded to: fp32, bf16 or fp16. All else is computed in fp32.
        top_k: Only the student's likeliest tokens; None for all, as this library computes information.
        add_tail: With `top_k`, one more bucket for the rest; otherwise renormalised.
    """

    precision: str = "fp32"
    top_k: int | None = None
    add_tail: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        if self.top_k is None:
            return self.precision
        return f"top {self.top_k}{' + tail' if self.add_tail else ', renormalised'}"


def views(top_k: list[int]) -> list[View]:
    """Return the views that are compared, the whole one first."""
    cut = [View(top_k=k, add_tail=tail) for k in top_k for tail in (True, False)]
    return [View(), View("bf16"), View("fp16"), *cut]


@torch.no_grad()
def token_statistics(student: Tensor, teacher: Tensor, targets: Tensor, view: View) -> TokenStatistics:
    """Return the statistics of some tokens as a view shows them.

    Log-probabilities of the sampled token need no distribution, so they are never cut.

    Args:
        student: Logits, shape ``(n, V)``.
        teacher: Likewise.
        targets: Sampled tokens, shape ``(n,)``.
        view: What is seen.
    """
    student, teacher = (logits.to(DTYPES[view.precision]).float() for logits in (student, teacher))
    _, tokens = row_statistics(student.clone(), teacher.clone(), targets, None)
    if view.top_k is None:
        return tokens
    log_s, log_t = student_top_k(student.log_softmax(-1), teacher.log_softmax(-1), view.top_k, view.add_tail)
    return tokens._replace(entropy_student=entropy(log_s), entropy_teacher=entropy(log_t), kl=forward_kl(log_s, log_t))


def sequence_statistics(tokens: TokenStatistics, lengths: Tensor, first: int | None = None) -> StepStatistics:
    """Average over each sequence, as a training step does.

    Args:
        tokens: Values of shape ``(N,)``, the sequences one after the other.
        lengths: Tokens of each sequence; they sum to N.
        first: Only the first so many tokens of each; None for all.
    """
    if first is not None:
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        tokens = tokens[place < first]
        lengths = lengths.clamp(max=first)
    zeros, rewards, apart = torch.zeros_like(tokens.kl), torch.zeros(len(lengths)), torch.arange(len(lengths))
    return StepStatistics.from_tokens(tokens, zeros, tokens.log_p_student, zeros, lengths, rewards, apart, True)
