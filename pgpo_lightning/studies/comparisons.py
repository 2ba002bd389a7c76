"""Runs grouped by condition and arm, and the pairs of arms that are compared.

Seeds are paired by their number, questions by their index. An information arm and its controls have the same suffix:
`pgpo-1.0` has the dose of `constant-1.0`, `random-1.0` and so on. The controls answer the objections of a referee of PGPO: a
larger learning rate (constant), the same multipliers on other batches (random, shuffled, replayed), and the opposite rule
(inverse).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from pgpo_lightning.core.settings import Natural, Positive, Range, checked
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.inference import Table
from pgpo_lightning.studies.measures import MEASURES, Measure

CONTROLS = ("constant", "random", "shuffled", "replayed", "inverse")
"""Names, without the suffix, of the arms with the dose of an information arm."""


@checked
@dataclass(frozen=True)
class Design:
    """Which arms are compared, and the criterion of an answer.

    Attributes:
        baseline: The arm that every arm is compared with.
        information: Names of information arms; `*` at the end matches any suffix.
        controls: Names of their controls without the suffix.
        decisive: Controls that an information arm has to exceed for a `yes`, all of them.
        measure: The deciding measure.
        margin: The smallest difference of interest, in the unit of the score.
        collapse: A run has collapsed if its score is below this fraction of the base model's.
        draws: Number of bootstrap resamples; 0 for no bootstrap.

    Raises:
        ValueError: If a setting is out of range.
    """

    baseline: str = "sdpo"
    information: tuple[str, ...] = ("pgpo*",)
    controls: tuple[str, ...] = CONTROLS
    decisive: tuple[str, ...] = ("constant",)
    measure: Measure = "final"
    margin: Positive = 0.02
    collapse: Annotated[float, Range(above=0, below=1)] = 0.5
    draws: Natural = 2000

    def __post_init__(self) -> None:
        if not self.decisive or not set(self.decisive) <= set(self.controls):
            raise ValueError(
                f"Expected `decisive` to be among `controls` ({', '.join(self.controls)}), but got {list(self.decisive)}."
            )

    def suffix(self, arm: str) -> str | None:
        """Return the suffix that an information arm shares with its controls; None for other arms.

        The suffix is what `*` matches. Without a `*` it is the part after the last hyphen.

        Example:
            >>> Design().suffix("pgpo-1.0"), Design().suffix("pgpo"), Design().suffix("sdpo")
            ('1.0', '', None)
        """
        for pattern in self.information:
            stem, star, _ = pattern.partition("*")
            if star and arm.startswith(stem):
                return arm[len(stem) :].lstrip("-")
            if arm == pattern:
                return arm.rpartition("-")[2] if "-" in arm else ""
        return None

    def control(self, name: str, arm: str) -> str:
        """Return the name of the control `name` of an information arm."""
        suffix = self.suffix(arm)
        return f"{name}-{suffix}" if suffix else name

    def order(self, arm: str) -> tuple[int, str]:
        """Return the sort key of an arm in tables."""
        if arm == self.baseline:
            return 0, arm
        if self.suffix(arm) is not None:
            return 1, arm
        positions = [i for i, control in enumerate(self.controls) if arm == control or arm.startswith(f"{control}-")]
        return 2 + (positions[0] if positions else len(self.controls)), arm


@dataclass
class Arm:
    """The runs of one arm under one condition, sorted by seed."""

    name: str
    runs: list[RunRecord]

    @cached_property
    def seeds(self) -> list[int]:
        """Return the seeds."""
        return [run.seed for run in self.runs]

    @cached_property
    def answers(self) -> Table:
        """Return mean rewards, ``(seeds, evaluations, questions)``."""
        return np.array([measures.answers(run) for run in self.runs])

    @cached_property
    def tables(self) -> dict[Measure, Table]:
        """Return each measure, ``(seeds, questions)``."""
        steps = measures.evaluations(self.runs[0])
        each = [measures.per_question(steps, table) for table in self.answers]
        return {measure: np.array([one[measure] for one in each]) for measure in MEASURES}

    @cached_property
    def doses(self) -> Table:
        """Return the mean multiplier of each run, ``(seeds,)``."""
        return np.array([measures.dose(run) for run in self.runs])

    def rows(self, seeds: list[int]) -> list[int]:
        """Return the row indices of `seeds`."""
        return [self.seeds.index(seed) for seed in seeds]


@dataclass
class Condition:
    """The runs of one condition. Arms are compared within it only."""

    name: str
    arms: dict[str, Arm]

    @property
    def first(self) -> RunRecord:
        """Return one run, for what all runs have in common."""
        return next(iter(self.arms.values())).runs[0]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of all arms."""
        return sorted({seed for arm in self.arms.values() for seed in arm.seeds})

    @property
    def multipliers(self) -> bool:
        """Return whether any run had a multiplier. Without one there are no doses."""
        return any(run.rho for arm in self.arms.values() for run in arm.runs)

    @property
    def informed(self) -> bool:
        """Return whether any run measured information. Objectives without a teacher do not."""
        return any(measures.INFORMATION in run.curves for arm in self.arms.values() for run in arm.runs)

    @property
    def steps(self) -> list[int]:
        """Return the steps of the evaluations."""
        return measures.evaluations(self.first)

    @property
    def questions(self) -> int:
        """Return the number of held-out questions."""
        return len(self.first.questions[str(self.steps[0])])


def conditions(runs: list[RunRecord], design: Design) -> list[Condition]:
    """Group runs by condition. Arms are in the order baseline, information arms, their controls, others.

    Records of older versions do not identify their held-out questions; for these only the number of questions is compared.

    Args:
        runs: Of one or more conditions.
        design: For the names of the arms.

    Raises:
        ValueError: If runs of a condition differ in steps, evaluations, held-out questions or samples; names them.
    """
    grouped: dict[str, dict[str, list[RunRecord]]] = {}
    for run in sorted(runs, key=lambda run: (run.study, run.arm, run.seed)):
        grouped.setdefault(run.study, {}).setdefault(run.arm, []).append(run)
    for study, arms in grouped.items():
        members = [run for arm in arms.values() for run in arm]
        _check(study, members, "number of steps", lambda run: run.steps)
        _check(study, members, "steps with an evaluation", lambda run: measures.evaluations(run) or "none")
        _check(
            study, members, "number of held-out questions", lambda run: sorted({len(q) for q in run.questions.values()})
        )
        identified = [run for run in members if "validation" in run.data]
        _check(study, identified, "held-out questions", lambda run: f"those with sha256 {run.data['validation'][:12]}")
        _check(study, members, "number of samples per question", lambda run: run.samples)
        if broken := [run for run in members if not run.questions or not np.isfinite(measures.answers(run)).all()]:
            raise ValueError(f"Expected a finite score of every held-out question, but got none in {_names(broken)}.")
    return [
        Condition(name, {arm: Arm(arm, arms[arm]) for arm in sorted(arms, key=design.order)})
        for name, arms in grouped.items()
    ]


def _check(study: str, runs: list[RunRecord], what: str, value: Callable[[RunRecord], Any]) -> None:
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(str(value(run)), []).append(run)
    if len(found) > 1:
        got = "; ".join(
            f"{each} in {_names(members)}" for each, members in sorted(found.items(), key=lambda kv: len(kv[1]))
        )
        raise ValueError(f"Expected all runs of study {study} to have the same {what}, but got {got}.")


def _names(runs: list[RunRecord]) -> str:
    names = ", ".join(f"{run.study}/{run.arm}/{run.seed}" for run in runs[:6])
    return names + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")


def common(a: Arm, b: Arm) -> list[int]:
    """Return the seeds that both arms have."""
    return sorted(set(a.seeds) & set(b.seeds))


def paired(a: Arm, b: Arm, measure: Measure, seeds: list[int]) -> Table:
    """Return the scores of `a` minus those of `b` on these seeds, ``(seeds, questions)``."""
    return a.tables[measure][a.rows(seeds)] - b.tables[measure][b.rows(seeds)]


def pairs(condition: Condition, design: Design) -> list[tuple[Arm, Arm, str]]:
    """Return the compared pairs and their kind: each arm with the baseline, each information arm with its controls."""
    arms = condition.arms
    found = [
        (arm, arms[design.baseline], "baseline")
        for name, arm in arms.items()
        if design.baseline in arms and name != design.baseline
    ]
    for name in filter(lambda name: design.suffix(name) is not None, arms):
        wanted = [(control, design.control(control, name)) for control in design.controls]
        found += [(arms[name], arms[control], kind) for kind, control in wanted if control in arms]
    return found
