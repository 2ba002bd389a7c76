"""Simulated runs of studies whose true differences are known."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pgpo_lightning.monitoring.collapse_rules import collapse_step
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.comparisons import Arm, Condition
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table
from pgpo_lightning.studies.measures import MEASURES, per_question


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
        arm_question_width: Half-width of the uniform effect of the arm's question, the same under all conditions.
        collapse: Arm to the probability that one of its runs ends at 0. Arms that are not named do not collapse.
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
    collapse: dict[str, float] = field(default_factory=dict)

    def truth(self, arm: str, difference: float) -> float:
        """Return the true final score of an arm: its mean over all seeds and questions, collapsed runs included."""
        return (self.level + difference) * (1 - self.collapse.get(arm, 0.0))


def draw(arms: Mapping[str, float], world: World, seed: int, condition: int = 0) -> dict[str, Table]:
    """Return the scores of each arm, ``(seeds, evaluations, questions)``.

    Args:
        arms: Name to the amount that the arm adds to the final probability.
        world: Parameters of the runs.
        seed: Of the study. It determines the effects of the questions.
        condition: Number of the condition within the study. It determines the effects of seeds, and the samples.
    """
    asked, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1 + condition])
    shape = (world.seeds, 1, world.questions)
    along = np.linspace(0, 1, world.evaluations + 1)[:, None]  # (evaluations, 1)
    shared = _normal(rng, world.seed_deviation, world.seeds)
    shared = shared + asked.uniform(-world.question_width, world.question_width, shape[1:])
    base = rng.binomial(world.samples, np.clip(world.base + shared, 0, 1)) / world.samples  # the same for all arms
    found = {}
    for arm, difference in arms.items():
        own = _normal(rng, world.arm_seed_deviation, world.seeds)
        own = own + asked.uniform(-world.arm_question_width, world.arm_question_width, world.questions)
        p = (
            world.base + shared + along * (world.level + difference - world.base + own)
        )  # (seeds, evaluations, questions)
        p *= 1 - along * (rng.random((world.seeds, 1, 1)) < world.collapse.get(arm, 0.0))
        scores = rng.binomial(world.samples, np.clip(p, 0, 1)) / world.samples
        scores[:, :1] = base
        found[arm] = scores
    return found


def _normal(rng: np.random.Generator, deviation: float, seeds: int) -> np.ndarray:
    """Return one effect per seed, clipped at three deviations to keep probabilities in [0, 1]: ``(seeds, 1, 1)``."""
    return np.clip(rng.normal(0, deviation, (seeds, 1, 1)), -3 * deviation, 3 * deviation)


def simulate(
    arms: dict[str, float],
    world: World,
    seed: int,
    study: str = "simulated",
    doses: dict[str, float] | None = None,
    steps: int = 30,
) -> list[RunRecord]:
    """Return the records of the runs of one condition.

    Args:
        arms: Name to the amount that the arm adds to the final probability.
        world: Parameters of the runs.
        seed: Of this study.
        study: Name of the condition.
        doses: Mean multiplier of arms that have one.
        steps: Of training.
    """
    rng = np.random.default_rng([seed, 1_000_000])
    at = np.linspace(0, steps, world.evaluations + 1).round().astype(int).tolist()
    runs = []
    for arm, scores in draw(arms, world, seed).items():
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


def simulated_condition(
    arms: Mapping[str, float], world: World, seed: int, design: Design, condition: int = 0
) -> Condition:
    """Return a condition as the report builds it from records, without the records."""
    steps = list(range(world.evaluations + 1))
    found = {}
    for name, scores in draw(arms, world, seed, condition).items():
        each = [per_question(steps, table) for table in scores]
        found[name] = Arm(
            name,
            list(range(world.seeds)),
            scores[:, 0],
            {measure: np.array([one[measure] for one in each]) for measure in MEASURES},
            [collapse_step(steps, table.mean(axis=1), design.collapse) for table in scores],
        )
    return Condition(f"condition-{condition}", found)
