"""Simulated studies with a known difference: coverage of the report's intervals, and how often its answer is wrong."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.analysis import compare, decide_condition
from pgpo_lightning.studies.comparisons import Design, conditions
from pgpo_lightning.studies.inference import pigeonhole


@dataclass(frozen=True)
class World:
    """Parameters of simulated runs. The defaults are near the toy task's standard deviation between seeds, 0.02 to 0.03.

    The probability that a sample is correct is a sum, so its mean over all seeds and questions is known exactly: the level of
    the arm, plus effects of the seed (shared by all arms), the arm's seed, the question (shared), and the arm's question.

    Attributes:
        seeds: Seeds per arm.
        questions: Held-out questions.
        samples: Samples per question; their rewards are 0 or 1.
        evaluations: Evaluations after the first one.
        base: Probability before the first step. It changes linearly to that of the arm.
        level: Probability of an arm without a difference at the end.
        seed_deviation: Standard deviation of the effect of the seed.
        arm_seed_deviation: Standard deviation of the effect of the arm's seed, which pairing does not remove.
        question_width: Half-width of the uniform effect of the question.
        arm_question_width: Half-width of the uniform effect of the arm's question.
        collapse: Probability that a run ends at 0.
    """

    seeds: int = 10
    questions: int = 100
    samples: int = 8
    evaluations: int = 2
    base: float = 0.5
    level: float = 0.6
    seed_deviation: float = 0.02
    arm_seed_deviation: float = 0.015
    question_width: float = 0.22
    arm_question_width: float = 0.05
    collapse: float = 0.0


def simulate(
    arms: dict[str, float],
    world: World,
    seed: int,
    study: str = "simulated",
    doses: dict[str, float] | None = None,
    steps: int = 30,
) -> list[RunRecord]:
    """Return the runs of a study.

    Args:
        arms: Name to the amount that the arm adds to the final probability.
        world: Parameters of the runs.
        seed: Of this study.
        study: Name of the condition.
        doses: Mean multiplier of arms that have one.
        steps: Of training.
    """
    rng = np.random.default_rng(seed)
    shape = (world.seeds, 1, world.questions)
    along = np.linspace(0, 1, world.evaluations + 1)[:, None]  # (evaluations, 1)
    at = np.linspace(0, steps, world.evaluations + 1).round().astype(int).tolist()
    shared = _normal(rng, world.seed_deviation, world.seeds) + rng.uniform(
        -world.question_width, world.question_width, shape[1:]
    )
    base = rng.binomial(world.samples, np.clip(world.base + shared, 0, 1)) / world.samples  # the same for all arms
    runs = []
    for arm, difference in arms.items():
        own = _normal(rng, world.arm_seed_deviation, world.seeds)
        own = own + rng.uniform(-world.arm_question_width, world.arm_question_width, world.questions)
        p = (
            world.base + shared + along * (world.level + difference - world.base + own)
        )  # (seeds, evaluations, questions)
        p *= 1 - along * (rng.random((world.seeds, 1, 1)) < world.collapse)
        scores = rng.binomial(world.samples, np.clip(p, 0, 1)) / world.samples
        scores[:, :1] = base
        dose = (doses or {}).get(arm)
        for number, table in enumerate(scores):
            rho = [] if dose is None else (dose + rng.uniform(-0.05, 0.05, steps)).tolist()
            score, training = table.mean(axis=1), list(range(1, steps + 1))
            curves = {
                f"val/avg@{world.samples}": [at, score.tolist()],
                "response_length/mean": [training, np.interp(training, at, 30 * score).tolist()],
                "rollout/neg_log_prob": [training, np.interp(training, at, 1 - score).tolist()],
                "information/mean": [training, np.interp(training, at, 0.2 * (1 - score)).tolist()],
            }
            questions = {str(step): row.tolist() for step, row in zip(at, table, strict=True)}
            runs.append(RunRecord(study, arm, number, steps, world.samples, 60.0, 60.0, curves, questions, rho))
    return runs


def _normal(rng: np.random.Generator, deviation: float, seeds: int) -> np.ndarray:
    """Return one effect per seed, clipped at three deviations to keep probabilities in [0, 1]: ``(seeds, 1, 1)``."""
    return np.clip(rng.normal(0, deviation, (seeds, 1, 1)), -3 * deviation, 3 * deviation)


def measure(
    difference: float, world: World, repeats: int = 500, margin: float = 0.02, seed: int = 0, draws: int = 500
) -> dict[str, Any]:
    """Analyse many simulated studies as the report does, and count.

    Args:
        difference: True gain of the information arm beyond its dose.
        world: Parameters of the runs.
        repeats: Number of studies.
        margin: The smallest difference of interest.
        seed: Of the first study.
        draws: Number of bootstrap resamples; 0 for no bootstrap.

    Returns:
        Fractions of the studies: `covered` (the 95 % interval contains the true gain), `bootstrap_covered`, and the fraction
        with each answer. Medians: `width` of the interval, and `seeds_needed` of the studies that are not resolved.
    """
    truth = difference * (1 - world.collapse)
    covered, resampled, widths, needed, answers = [], [], [], [], Counter[str]()
    design = Design(margin=margin)
    for number in range(repeats):
        runs = simulate({"pgpo-1.0": difference, "constant-1.0": 0.0}, world, seed + number)
        (compared,) = compare(conditions(runs, design)[0], design, "final")
        decided = decide_condition([compared], design)
        low, high = compared.mean.interval()
        covered.append(low <= truth <= high)
        widths.append(high - low)
        if draws:
            low, high = pigeonhole(compared.table, draws)
            resampled.append(low <= truth <= high)
        answers[decided["answer"]] += 1
        needed.append(decided["seeds_needed"])
    unresolved = [number for number in needed if number is not None]
    return {
        "covered": float(np.mean(covered)),
        "bootstrap_covered": float(np.mean(resampled)) if draws else None,
        **{answer: answers[answer] / repeats for answer in ("yes", "no", "not resolved")},
        "width": float(np.median(widths)),
        "seeds_needed": float(np.median(unresolved)) if unresolved else None,
    }
