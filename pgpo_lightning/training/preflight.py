"""Whether the first batch shows that the teacher harms, before the first optimizer step."""

import torch
from torch import Tensor

from pgpo_lightning.losses.information import Information, clustered_error, information
from pgpo_lightning.losses.step_statistics import StepStatistics

LEVEL = 0.01
"""Probability of a warning, in a run of its own, where the true value is 0; one-sided, Student's t over questions."""


def significantly_negative(value: float, standard_error: float, questions: int, level: float = LEVEL) -> bool:
    """Return whether a mean over questions is below 0.

    Args:
        value: The mean.
        standard_error: Clustered by question.
        questions: Their number; fewer than 2 say nothing.
        level: One-sided.

    Example:
        >>> significantly_negative(-0.69, 0.19, 8), significantly_negative(-0.5, 0.19, 8)
        (True, False)
    """
    from scipy.stats import t  # half a second, for what runs once

    return questions > 1 and value < float(t.ppf(level, questions - 1)) * standard_error


def less_certain(statistics: StepStatistics) -> str | None:
    """Return what to say if the teacher is less certain than the student, or None.

    Args:
        statistics: Of the first optimizer step, of all ranks; student and teacher still have the same weights.
    """
    signal = information(statistics)
    questions = statistics.question[statistics.has_teacher.bool()].unique().numel()
    if not significantly_negative(signal.value, signal.standard_error, questions):
        return None
    return (
        f"the teacher is less certain than the student: I = {signal.value:.3g} +- {signal.standard_error:.2g} nats per token "
        f"over {questions} questions, below 0 at the one-sided level of {LEVEL:.0%}. What the teacher is shown may harm. "
        "Measure what it is worth with `pgpo probe` before you train"
    )


def net_gap(gains: Tensor, question: Tensor) -> Information:
    """Return the mean gain and its standard error, clustered by question.

    Args:
        gains: Success of the teacher's answer less that of a fresh answer to the plain prompt, shape ``(n,)``.
        question: Their questions' numbers, shape ``(n,)``.
    """
    value = gains.double().mean()
    return Information(value.item(), clustered_error(gains.double() - value, question))


def less_successful(gap: Information, questions: int) -> str | None:
    """Return what to say if the teacher's answers succeed less often than the student's, or None."""
    if not significantly_negative(gap.value, gap.standard_error, questions):
        return None
    return (
        f"the teacher answers worse than the student: net gap {gap.value:.3g} +- {gap.standard_error:.2g} over {questions} "
        f"questions, below 0 at the one-sided level of {LEVEL:.0%}. What the teacher is shown harms. Compare contexts with "
        "`pgpo probe` before you train"
    )


def joined(parts: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor]:
    """Return gains and questions of all ranks from (question, gain) pairs of each."""
    pairs = [pair for part in parts for pair in part]
    return torch.tensor([gain for _, gain in pairs]), torch.tensor([question for question, _ in pairs])
