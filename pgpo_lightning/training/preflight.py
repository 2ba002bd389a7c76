"""Whether the first batch shows that the teacher harms, before the first optimizer step."""

import math
from collections.abc import Callable

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.distributed.collectives import gather
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


def measure_gap(
    samples: list[Sample],
    generate: Callable[[list[Question], list[list[int]]], list[Rollout]],
    judge: Callable[[list[Rollout]], list[Verdict]],
    threshold: float,
    step: int,
) -> dict[str, float]:
    """Answer every question that has a teacher from the reprompt and from the plain prompt; warn if the former is worse.

    Args:
        samples: This rank's.
        generate: From questions and prompts of token ids to one rollout each.
        judge: From rollouts to verdicts.
        threshold: Rewards of at least this count as success.
        step: Batches trained on so far.

    Returns:
        Scalars to log.
    """
    taught = [sample for sample in samples if sample.reprompt_ids is not None]
    questions = [sample.rollout.question for sample in taught]
    success = []
    for prompts in ([sample.reprompt_ids for sample in taught], [sample.rollout.prompt_ids for sample in taught]):
        answers = generate(questions, prompts) if taught else []
        success.append([verdict.reward >= threshold for verdict in judge(answers)])
    local = [(q.index, float(t) - float(s)) for q, t, s in zip(questions, *success, strict=True)]
    gains, question = joined(gather(local))
    if not len(gains):
        return {}
    gap = net_gap(gains, question)
    scalars = {"self_distillation/net_gap": gap.value}
    if not math.isnan(gap.standard_error):
        scalars["self_distillation/net_gap_standard_error"] = gap.standard_error
    if (harm := less_successful(gap, question.unique().numel())) is not None:
        rank_zero_warn(f"Step {step + 1}: {harm}.")
    return scalars
