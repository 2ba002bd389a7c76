"""Statistics of one optimizer step: one row per sequence in the loss.

This is the interface between modules and callbacks: a module fills :class:`StepStatistics` before the optimizer step, and a
step-size multiplier computes its factor from it.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pgpo_lightning.losses.fused import TokenStatistics


@dataclass
class StepStatistics:
    """Statistics of the sequences in the loss of one optimizer step, all of shape ``(sequences,)``, fp32.

    Per-token values are means over the response tokens of the sequence, so ``value * length`` is their sum. Teacher values are
    NaN for objectives without a teacher.

    Attributes:
        entropy_student: Entropy H of the student's next-token distribution (nats).
        entropy_teacher: Entropy H of the teacher's next-token distribution (nats).
        kl: KL(teacher||student) (nats).
        log_ratio: log T(y) - log S(y) of the sampled tokens (nats).
        sampler_log_ratio: log S(y) - log sampler(y) of the sampled tokens (nats); 0 if trainer and sampler agree.
        sampler_gap: |log S(y) - log sampler(y)| of the sampled tokens (nats); differences do not cancel within a sequence.
        loss: The objective's loss before importance weights.
        divergence: Divergence between student and teacher (nats), without entry clip and softening.
        weight: The importance weight.
        length: Response tokens.
        reward: The verifier's score.
        has_teacher: 1 if a teacher context exists.
        question: Index of the question (exact below 2^24). Standard errors are clustered by it, because rollouts of one question
            are correlated.
    """

    entropy_student: Tensor
    entropy_teacher: Tensor
    kl: Tensor
    log_ratio: Tensor
    sampler_log_ratio: Tensor
    sampler_gap: Tensor
    loss: Tensor
    divergence: Tensor
    weight: Tensor
    length: Tensor
    reward: Tensor
    has_teacher: Tensor
    question: Tensor

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.length.numel()

    @classmethod
    def from_tokens(
        cls,
        tokens: TokenStatistics,
        loss: Tensor,
        sampler_log_p: Tensor,
        weight: Tensor,
        lengths: Tensor,
        rewards: Tensor,
        questions: Tensor,
        has_teacher: bool,
    ) -> "StepStatistics":
        """Average per-token values over each sequence.

        Args:
            tokens: Statistics of shape ``(N,)``, one sequence after the other.
            loss: Loss of each token, shape ``(N,)``.
            sampler_log_p: Log-probabilities under the sampler, shape ``(N,)``.
            weight: Importance weights, shape ``(N,)``.
            lengths: Response tokens of each sequence, shape ``(sequences,)``; they sum to N.
            rewards: Verifier scores, shape ``(sequences,)``.
            questions: Indices of the questions, shape ``(sequences,)``.
            has_teacher: Whether a teacher was run on these sequences.
        """
        order = torch.arange(len(lengths), device=lengths.device)
        # A known size needs no synchronisation with the device.
        sequence = order.repeat_interleave(lengths, output_size=weight.numel())  # (N,)

        def mean(values: Tensor) -> Tensor:
            total = torch.zeros(len(lengths), dtype=torch.float32, device=values.device)
            return total.index_add(0, sequence, values.detach().float()) / lengths

        return cls(
            entropy_student=mean(tokens.entropy_student),
            entropy_teacher=mean(tokens.entropy_teacher),
            kl=mean(tokens.kl),
            log_ratio=mean(tokens.log_p_teacher - tokens.log_p_student),
            sampler_log_ratio=mean(tokens.log_p_student - sampler_log_p),
            sampler_gap=mean((tokens.log_p_student - sampler_log_p).abs()),
            loss=mean(loss),
            divergence=mean(tokens.plain),
            weight=mean(weight),
            length=lengths.float(),
            reward=rewards.float(),
            has_teacher=torch.full_like(lengths, has_teacher, dtype=torch.float32),
            question=questions.float(),
        )

    @classmethod
    def empty(cls) -> "StepStatistics":
        """Return the statistics of a step without sequences."""
        return cls(*(torch.zeros(0, dtype=torch.float32) for _ in fields(cls)))

    @classmethod
    def concatenate(cls, parts: list["StepStatistics"]) -> "StepStatistics":
        """Join the statistics of several micro-batches."""
        return (
            cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls))) if parts else cls.empty()
        )

    def table(self) -> Tensor:
        """Return all statistics as one tensor of shape ``(sequences, fields)``, for gathering over ranks."""
        return torch.stack([getattr(self, f.name) for f in fields(self)], dim=1)

    @classmethod
    def from_table(cls, table: Tensor) -> "StepStatistics":
        """Return the statistics that :meth:`table` turned into a tensor."""
        return cls(*table.unbind(1))
