"""What is measured of one finished run, from its record alone."""

import math
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pgpo_lightning.monitoring.run_record import RunRecord

Measure = Literal["final", "best", "area"]
"""A held-out score: at the last evaluation, at the run's best one, or its mean over the steps (area under the curve)."""

MEASURES: tuple[Measure, ...] = ("final", "best", "area")

LENGTH = "response_length/mean"
ENTROPY = "rollout/neg_log_prob"
"""Of the rollouts: unlike `actor/entropy` it is there when no row is in the loss any more."""
INFORMATION = "information/mean"


def evaluations(run: RunRecord) -> list[int]:
    """Return the steps at which a run was evaluated, in order."""
    return sorted(map(int, run.questions))


def answers(run: RunRecord) -> NDArray[np.float64]:
    """Return the mean reward of every held-out question at every evaluation, shape ``(evaluations, questions)``."""
    return np.array([run.questions[str(step)] for step in evaluations(run)], dtype=float)


def per_question(steps: list[int], table: NDArray[np.float64]) -> dict[Measure, NDArray[np.float64]]:
    """Return each measure of a run question by question; their means over questions are the run's measures.

    Args:
        steps: Of the evaluations.
        table: From :func:`answers`.

    Returns:
        `final`: the last evaluation; `best`: the one with the highest mean, the first of equals (its score is too high by what
        choosing adds); `area`: the trapezoid mean over the steps. Each ``(questions,)``.
    """
    return {"final": table[-1], "best": table[table.mean(axis=1).argmax()], "area": _weights(steps) @ table}


def _weights(steps: list[int]) -> NDArray[np.float64]:
    """Return the weight of each evaluation in the trapezoid mean over steps; they sum to 1."""
    if len(steps) == 1:
        return np.ones(1)
    weights = np.zeros(len(steps))
    for i, (a, b) in enumerate(pairwise(steps)):
        weights[i : i + 2] += (b - a) / 2
    return weights / (steps[-1] - steps[0])


def collapse_step(steps: list[int], scores: NDArray[np.float64], below: float = 0.5) -> int | None:
    """Return when a run collapsed: the first evaluation whose score is less than a share of the first one's, or None.

    The first evaluation is that of the base model where there is one at step 0.

    Args:
        steps: Of the evaluations.
        scores: Held-out scores, ``(evaluations,)``.
        below: The share.

    Example:
        >>> collapse_step([0, 10, 20], np.array([0.5, 0.3, 0.2]))
        20
    """
    return next((step for step, score in zip(steps, scores, strict=True) if score < below * scores[0]), None)


def curve(run: RunRecord, tag: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a curve; both empty if the run has none."""
    steps, values = run.curves.get(tag, ([], []))
    return list(steps), list(values)


def at_the_end(run: RunRecord, tag: str) -> float:
    """Return the mean of a curve over the last tenth of the run's steps, NaN if it has no point there."""
    values = [value for step, value in zip(*curve(run, tag), strict=True) if step > 0.9 * run.steps]
    return math.fsum(values) / len(values) if values else math.nan


def dose(run: RunRecord) -> float:
    """Return the mean multiplier over the optimizer steps; 1 without a multiplier."""
    return math.fsum(run.rho) / len(run.rho) if run.rho else 1.0
