"""Measures of one finished run, computed from its record alone."""

import math
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pgpo_lightning.monitoring.run_record import RunRecord

Measure = Literal["final", "best", "area"]
"""Held-out score at the last evaluation, at the run's best evaluation, or its mean over the steps (area under the curve)."""

MEASURES: tuple[Measure, ...] = ("final", "best", "area")

Score = Literal["avg", "solution-probability"]
"""Held-out score of a question: the mean reward of its samples, or the exact probability of its worked solution."""

LENGTH = "response_length/mean"
ENTROPY = "rollout/neg_log_prob"
"""Of the rollouts. Unlike `actor/entropy` it is also logged when no rollout is in the loss."""
INFORMATION = "information/mean"


def score_table(run: RunRecord, score: Score = "avg") -> dict[str, list[float]]:
    """Return the score of every held-out question by step; empty if the record does not have this score."""
    return run.questions if score == "avg" else run.solution_probabilities


def evaluations(run: RunRecord, score: Score = "avg") -> list[int]:
    """Return the steps at which a run was evaluated, sorted."""
    return sorted(map(int, score_table(run, score)))


def answers(run: RunRecord, score: Score = "avg") -> NDArray[np.float64]:
    """Return the score of every held-out question at every evaluation, shape ``(evaluations, questions)``."""
    table = score_table(run, score)
    return np.array([table[str(step)] for step in evaluations(run, score)], dtype=float)


def per_question(steps: list[int], table: NDArray[np.float64]) -> dict[Measure, NDArray[np.float64]]:
    """Return each measure of a run for every question. The mean over questions is the run's measure.

    Args:
        steps: Of the evaluations.
        table: From :func:`answers`.

    Returns:
        `final`: the last evaluation. `best`: the evaluation with the highest mean, the first one if several are equal; it is
        biased upwards by this choice. `area`: the trapezoid mean over the steps. Each ``(questions,)``.
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


def curve(run: RunRecord, tag: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of a curve; both are empty if the run does not have it."""
    steps, values = run.curves.get(tag, ([], []))
    return list(steps), list(values)


def at_the_end(run: RunRecord, tag: str) -> float:
    """Return the mean of a curve over the last tenth of the run's steps; NaN if it has no point there."""
    values = [value for step, value in zip(*curve(run, tag), strict=True) if step > 0.9 * run.steps]
    return math.fsum(values) / len(values) if values else math.nan


def dose(run: RunRecord) -> float:
    """Return the mean multiplier over the optimizer steps; 1 without a multiplier."""
    return math.fsum(run.rho) / len(run.rho) if run.rho else 1.0
