"""The information gain of a step (I_k of PGPO, arXiv 2606.03620), estimated from its statistics, with a standard error."""

import math
from typing import Literal, NamedTuple

from torch import Tensor

from pgpo_lightning.losses.step_statistics import StepStatistics

Estimator = Literal["entropy-difference", "kl", "log-ratio"]
Aggregation = Literal["sequence-mean", "token-mean", "sequence-sum"]

Signal = Literal["information", "teacher-certainty", "relative"]
"""What a step size is made from: see :class:`pgpo_lightning.callbacks.InformationMultiplier`."""


class Information(NamedTuple):
    """The information estimate of a step and its standard error, in nats."""

    value: float
    standard_error: float


def information(
    statistics: StepStatistics,
    estimator: Estimator = "entropy-difference",
    aggregation: Aggregation = "sequence-mean",
) -> Information:
    r"""Estimate the information gain of the teacher from the feedback: I_k of PGPO (arXiv 2606.03620, Eq. 8).

    Estimators, per token:

    - ``entropy-difference``: H(student) - H(teacher), the paper's Eq. 8. Negative where the feedback makes the teacher less
      certain.
    - ``kl``: KL(teacher||student), never negative. Its mean over feedback is the mutual information exactly if the student is
      the teacher's marginal over the feedback.
    - ``log-ratio``: log T(y) - log S(y) of the sampled tokens, which needs no full distribution. It is noisy. Its mean under the
      student is -KL(S||T), so it is negative on the student's own samples.

    Args:
        statistics: Statistics of one step. Only sequences with a teacher count.
        estimator: One of the three above.
        aggregation: ``sequence-mean``: mean over each sequence's tokens, then over sequences; ``token-mean``: mean over all
            tokens; ``sequence-sum``: sum over each sequence's tokens, mean over sequences.

    Returns:
        The estimate and its standard error over questions (NaN for fewer than two). ``(0, nan)`` if no sequence has a teacher:
        without feedback there is no information. The standard error is clustered by question, because siblings answer the same
        question and read the same demonstration. Without clustering it would be too small, by half on the toy
        (``docs/theory.md``).

    Example:
        >>> information(StepStatistics.empty()).value
        0.0
    """
    values = {
        "entropy-difference": statistics.entropy_student - statistics.entropy_teacher,
        "kl": statistics.kl,
        "log-ratio": statistics.log_ratio,
    }[estimator]
    return _aggregated(values, statistics, aggregation)


def teacher_certainty(statistics: StepStatistics, aggregation: Aggregation = "sequence-mean") -> Information:
    """Return the negative entropy of the teacher, -H(teacher), and its standard error.

    Args:
        statistics: Statistics of one step. Only sequences with a teacher count.
        aggregation: As for :func:`information`.
    """
    return _aggregated(-statistics.entropy_teacher, statistics, aggregation)


def _aggregated(values: Tensor, statistics: StepStatistics, aggregation: Aggregation) -> Information:
    """Return the mean of a value per token over the sequences with a teacher; values of shape ``(sequences,)``."""
    counted = statistics.has_teacher.bool()
    values = values[counted].double()
    length = statistics.length[counted].double()  # (sequences with a teacher,)
    n = values.numel()
    if n == 0:
        return Information(0.0, math.nan)
    if aggregation == "token-mean":
        # This is a ratio of two means over sequences. Its standard error is that of the residuals about the ratio.
        value = (values * length).sum() / length.sum()
        residuals = (values - value) * length / length.mean()
    else:
        values = values * length if aggregation == "sequence-sum" else values
        value = values.mean()
        residuals = values - value
    return Information(value.item(), clustered_error(residuals, statistics.question[counted]))


def clustered_error(residuals: Tensor, question: Tensor) -> float:
    """Return the standard error of a mean over rollouts, clustered by question; NaN for fewer than two questions.

    Args:
        residuals: Difference between each rollout's value and the mean, shape ``(n,)``, fp64.
        question: Index of each rollout's question, shape ``(n,)``.
    """
    questions, group_index = question.unique(return_inverse=True)
    groups = questions.numel()
    sums = residuals.new_zeros(groups).index_add(0, group_index, residuals)  # (questions,)
    return (sums.square().sum() * groups / (groups - 1)).sqrt().item() / residuals.numel() if groups > 1 else math.nan
