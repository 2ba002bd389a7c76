"""Checks before the first optimizer step that the teacher is not worse than the student."""

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
"""Probability of a false warning per run if the true value is 0: one-sided, Student's t over questions."""


def significantly_negative(value: float, standard_error: float, questions: int, level: float = LEVEL) -> bool:
    """Return whether a mean over questions is significantly below 0.

    Args:
        value: The mean.
        standard_error: Its standard error, clustered by question.
        questions: Number of questions. With fewer than 2 the result is false.
        level: One-sided significance level.

    Example:
        >>> significantly_negative(-0.69, 0.19, 8), significantly_negative(-0.5, 0.19, 8)
        (True, False)
    """
    from scipy.stats import t  # imported here: it takes half a second and runs once

    return questions > 1 and value < float(t.ppf(level, questions - 1)) * standard_error


def less_certain(statistics: StepStatistics) -> str | None:
    """Return a warning if the teacher is less certain than the student, else ``None``.

    Args:
        statistics: Statistics of the first optimizer step, of all ranks, when student and teacher have the same weights.
    """
    signal = information(statistics)
    questions = statistics.question[statistics.has_teacher.bool()].unique().numel()
    if not significantly_negative(signal.value, signal.standard_error, questions):
        return None
    return (
        f"the teacher is less certain than the student: I = {signal.value:.3g} +- {signal.standard_error:.2g} nats per token "
        f"over {questions} questions, below 0 at the one-sided level of {LEVEL:.0%}. The teacher's context may harm. "
        "Measure its effect with `pgpo probe` before you train"
    )


def net_gap(gains: Tensor, question: Tensor) -> Information:
    """Return the mean gain and its standard error, clustered by question.

    Args:
        gains: Success of the teacher's answer minus that of a new answer to the plain prompt, shape ``(n,)``.
        question: Indices of the questions, shape ``(n,)``.
    """
    value = gains.double().mean()
    return Information(value.item(), clustered_error(gains.double() - value, question))


def less_successful(gap: Information, questions: int) -> str | None:
    """Return a warning if the teacher's answers succeed less often than the student's, else ``None``."""
    if not significantly_negative(gap.value, gap.standard_error, questions):
        return None
    return (
        f"the teacher answers worse than the student: net gap {gap.value:.3g} +- {gap.standard_error:.2g} over {questions} "
        f"questions, below 0 at the one-sided level of {LEVEL:.0%}. The teacher's context harms. Compare contexts with "
        "`pgpo probe` before you train"
    )


def joined(parts: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor]:
    """Return gains and question indices of all ranks from each rank's (question, gain) pairs."""
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
    reprompts = [sample.reprompt_ids for sample in taught if sample.reprompt_ids is not None]
    success = []
    for prompts in (reprompts, [sample.rollout.prompt_ids for sample in taught]):
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
