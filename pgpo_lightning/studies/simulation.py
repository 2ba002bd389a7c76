"""Studies whose truth is known: do the report's intervals cover it, and how often is its answer wrong?

``python -m pgpo_lightning.studies.simulation --seeds 10 --difference 0.02``, or with other numbers, before a study is paid for.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jsonargparse
import numpy as np

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.analysis import compare, decide_study
from pgpo_lightning.studies.comparisons import Design, studies
from pgpo_lightning.studies.inference import pigeonhole


@dataclass(frozen=True)
class World:
    """What simulated runs are made of. The defaults are near the toy task's between-seed spread of 0.02 to 0.03.

    The probability that a sample is right is a sum, so its mean over all seeds and questions is known exactly: the arm's own,
    plus effects of the seed (that all arms share), of the arm's seed, of the question (shared), and of the arm's question.

    Attributes:
        seeds: Seeds per arm.
        questions: Held-out questions.
        samples: Samples per question; their rewards are 0 or 1.
        evaluations: Evaluations after the first one.
        base: Probability before the first step; it rises to that of the arm along a straight line.
        level: Probability of an arm without a difference at the end.
        of_seed: Standard deviation.
        of_arm_seed: Standard deviation of what pairing cannot remove.
        of_question: Half-width of a uniform.
        of_arm_question: Half-width of a uniform.
        collapse: Probability that a run ends at 0.
    """

    seeds: int = 10
    questions: int = 100
    samples: int = 8
    evaluations: int = 2
    base: float = 0.5
    level: float = 0.6
    of_seed: float = 0.02
    of_arm_seed: float = 0.015
    of_question: float = 0.22
    of_arm_question: float = 0.05
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
        arms: Name to what it adds to the probability at the end.
        world: What runs are made of.
        seed: Of this study.
        study: Its name.
        doses: Mean multiplier of arms that have one.
        steps: Of training.
    """
    rng = np.random.default_rng(seed)
    shape = (world.seeds, 1, world.questions)
    along = np.linspace(0, 1, world.evaluations + 1)[:, None]  # (evaluations, 1)
    at = np.linspace(0, steps, world.evaluations + 1).round().astype(int).tolist()
    shared = _normal(rng, world.of_seed, world.seeds) + rng.uniform(-world.of_question, world.of_question, shape[1:])
    base = rng.binomial(world.samples, np.clip(world.base + shared, 0, 1)) / world.samples  # the same for all arms
    runs = []
    for arm, difference in arms.items():
        own = _normal(rng, world.of_arm_seed, world.seeds)
        own = own + rng.uniform(-world.of_arm_question, world.of_arm_question, world.questions)
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
    """Draw one effect per seed, cut at three deviations so that probabilities stay probabilities: ``(seeds, 1, 1)``."""
    return np.clip(rng.normal(0, deviation, (seeds, 1, 1)), -3 * deviation, 3 * deviation)


def measure(
    difference: float, world: World, repeats: int = 500, margin: float = 0.02, seed: int = 0, draws: int = 500
) -> dict[str, Any]:
    """Analyse many studies as the report does, and count.

    Args:
        difference: What the information arm truly adds beyond its dose.
        world: What runs are made of.
        repeats: Number of studies.
        margin: The smallest difference of interest.
        seed: Of the first study.
        draws: Resamples of the bootstrap; 0 for none.

    Returns:
        Shares of the studies: `covered` (the 95 % interval holds the truth), `bootstrap_covered`, and those of each
        answer; and the medians of `width` (of the interval) and `seeds_needed` (of those that are not resolved).
    """
    truth = difference * (1 - world.collapse)
    covered, resampled, widths, needed, answers = [], [], [], [], Counter[str]()
    design = Design(margin=margin)
    for number in range(repeats):
        runs = simulate({"pgpo-1.0": difference, "constant-1.0": 0.0}, world, seed + number)
        (compared,) = compare(studies(runs, design)[0], design, "final")
        decided = decide_study([compared], design)
        low, high = compared.mean.interval()
        covered.append(low <= truth <= high)
        widths.append(high - low)
        if draws:
            low, high = pigeonhole(compared.table, draws)
            resampled.append(low <= truth <= high)
        answers[decided["answer"]] += 1
        needed.append(decided["seeds_needed"])
    there = [number for number in needed if number is not None]
    return {
        "covered": float(np.mean(covered)),
        "bootstrap_covered": float(np.mean(resampled)) if draws else None,
        **{answer: answers[answer] / repeats for answer in ("yes", "no", "not resolved")},
        "width": float(np.median(widths)),
        "seeds_needed": float(np.median(there)) if there else None,
    }


def main(world: World, difference: float = 0.0, repeats: int = 500, margin: float = 0.02, seed: int = 0) -> None:
    """Simulate studies with a known difference, and print how the report does on them.

    Args:
        world: What runs are made of.
        difference: What the information arm truly adds beyond its dose.
        repeats: Number of studies.
        margin: The smallest difference of interest.
        seed: Of the first study.
    """
    for name, value in measure(difference, world, repeats, margin, seed).items():
        print(f"{name:18}" + ("-" if value is None else f"{value:.4g}"))


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
