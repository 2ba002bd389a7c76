r"""Accuracy gaps of a self-teacher with standard errors. Pure functions of numpy arrays.

With student score :math:`s_{ik}` and teacher score :math:`t_{ik}` on question i, rollout k, the gap of a context c is
:math:`g(c) = \bar t - \bar s` (arXiv 2605.30070). A rollout without the context keeps its plain prompt. Its teacher score is
that of `none`, a second sample from the plain prompt. Contexts are compared by the net gap :math:`g(c) - g(\text{none})`, to
which such rollouts add exactly 0. Standard errors are from a bootstrap over questions, which resamples all scores of a
question together. All contexts share the draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
"""Scores of shape ``(questions, samples)``."""

DRAWS = 2000


@dataclass(frozen=True)
class Value:
    """An estimate and its bootstrap standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Gap:
    """The gap of a context before training.

    Attributes:
        coverage: Fraction of the rollouts that get the context.
        coverage_failed: Fraction of the failed rollouts that get it; NaN if none failed.
        teacher: Mean score of the teacher, with the plain prompt for rollouts without the context.
        gap: Teacher minus student.
        net: Gap less that of `none`.
        net_failed: The net gap if only failed rollouts get the context and successes keep their plain prompt, the scale of
            arXiv 2605.30070. For scores of 0 and 1 it is (fraction failed) * (recovery - recovery of `none`).
        recovery: Fraction of the failed rollouts whose teacher succeeds.
        recovery_net: Recovery minus that of `none`, which a second attempt recovers without a context.
        by_question: Net gap of each question, ``(questions,)``.
        by_question_failed: `net_failed` of each question.
    """

    coverage: float
    coverage_failed: float
    teacher: Value
    gap: Value
    net: Value
    net_failed: Value
    recovery: Value
    recovery_net: Value
    by_question: Table
    by_question_failed: Table


def question_draws(questions: int, draws: int = DRAWS, seed: int = 0) -> Table:
    """Return how often each bootstrap sample contains each question, ``(draws, questions)``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(questions, np.full(questions, 1 / questions), draws).astype(float)


def gap(student: Table, none: Table, teacher: Table, threshold: float, draws: Table) -> Gap:
    """Return the gap of a context.

    Args:
        student: Scores of the rollouts.
        none: Scores of the teacher with the plain prompt, one for each rollout.
        teacher: Scores of the teacher with the context; NaN where a rollout does not get it.
        threshold: Smallest score that counts as success.
        draws: From :func:`question_draws`.

    Raises:
        ValueError: If shapes differ or `none` has missing scores.
    """
    if not student.shape == none.shape == teacher.shape:
        raise ValueError(f"Expected tables of one shape, but got {student.shape}, {none.shape} and {teacher.shape}.")
    if np.isnan(none).any():
        raise ValueError("Expected `none` to cover every rollout, but it has missing scores.")
    covered, failed = ~np.isnan(teacher), student < threshold
    score = np.where(covered, teacher, none)
    net = (score - none).mean(axis=1)
    net_failed = ((score - none) * failed).mean(axis=1)
    recovered, again = (score >= threshold) & failed, (none >= threshold) & failed
    failures = failed.sum(axis=1).astype(float)
    ones = np.ones(len(student))
    return Gap(
        coverage=float(covered.mean()),
        coverage_failed=float(covered[failed].mean()) if failed.any() else float("nan"),
        teacher=ratio(score.mean(axis=1), ones, draws),
        gap=ratio((score - student).mean(axis=1), ones, draws),
        net=ratio(net, ones, draws),
        net_failed=ratio(net_failed, ones, draws),
        recovery=ratio(recovered.sum(axis=1), failures, draws),
        recovery_net=ratio(recovered.sum(axis=1) - again.sum(axis=1), failures, draws),
        by_question=net,
        by_question_failed=net_failed,
    )


def ratio(numerator: NDArray[np.floating | np.integer], denominator: Table, draws: Table) -> Value:
    """Return sum(numerator) / sum(denominator) over questions; NaN if the denominator is 0.

    Args:
        numerator: Of each question, ``(questions,)``.
        denominator: Likewise; ones for a mean.
        draws: From :func:`question_draws`.
    """
    if not denominator.sum():
        return Value(float("nan"), float("nan"))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (draws @ numerator) / (draws @ denominator)
    return Value(float(numerator.sum() / denominator.sum()), float(np.nanstd(drawn)))


def kept(part: Table, whole: Table, draws: Table, level: float = 0.95) -> tuple[float, float, float]:
    """Return the ratio of a control's net gap to that of its context, with its bootstrap percentile interval.

    Args:
        part: Net gap of the control for each question, ``(questions,)``.
        whole: Net gap of its context, likewise.
        draws: From :func:`question_draws`.
        level: Of the interval.
    """
    if not whole.sum():
        return float("nan"), float("nan"), float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (draws @ part) / (draws @ whole)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(part.sum() / whole.sum()), float(low), float(high)
