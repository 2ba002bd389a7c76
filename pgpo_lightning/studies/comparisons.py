"""Runs grouped by condition and arm, and the pairs of arms that are compared.

Seeds are paired by their number, questions by their index. An information arm and its controls have the same suffix:
`pgpo-1.0` has the dose of `constant-1.0`, `random-1.0` and so on. The controls answer the objections of a referee of PGPO: a
larger learning rate (constant), the same multipliers on other batches (random, shuffled, replayed), and the opposite rule
(inverse).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pgpo_lightning.monitoring.collapse_rules import collapse_step
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table
from pgpo_lightning.studies.measures import MEASURES, Measure, Score


@dataclass
class Arm:
    """The results of one arm under one condition, sorted by seed.

    Attributes:
        name: Its name.
        seeds: Its seeds.
        base: Scores at the first evaluation, ``(seeds, questions)``.
        tables: Each measure, ``(seeds, questions)``.
        collapsed: For each seed the first step at which the run had collapsed, or None.
        runs: The records.
    """

    name: str
    seeds: list[int]
    base: Table
    tables: dict[Measure, Table]
    collapsed: list[int | None]
    runs: list[RunRecord] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, runs: list[RunRecord], design: Design) -> "Arm":
        """Return the arm of these runs, which are sorted by seed."""
        steps = measures.evaluations(runs[0], design.score)
        tables = [measures.answers(run, design.score) for run in runs]
        each = [measures.per_question(steps, table) for table in tables]
        collapsed = [
            collapse_step(measures.evaluations(run), measures.answers(run).mean(axis=1), design.collapse)
            for run in runs
        ]
        return cls(
            name,
            [run.seed for run in runs],
            np.array([table[0] for table in tables]),
            {measure: np.array([one[measure] for one in each]) for measure in MEASURES},
            collapsed,
            runs,
        )

    @property
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
    score: Score = "avg"

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
        return measures.evaluations(self.first, self.score)

    @property
    def questions(self) -> int:
        """Return the number of held-out questions."""
        return next(iter(self.arms.values())).base.shape[1]

    @property
    def identity(self) -> str:
        """Return what identifies the held-out questions: their hash, or their number where no record has the hash."""
        hashes = {run.data["validation"] for arm in self.arms.values() for run in arm.runs if "validation" in run.data}
        return min(hashes, default=str(self.questions))


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
        if without := [run for run in members if not measures.score_table(run, design.score)]:
            name = "evaluation" if design.score == "avg" else f"evaluation of the {design.score}"
            raise ValueError(f"Expected every run to have an {name}, but got none in {_names(without)}.")
        _check(study, members, "number of steps", lambda run: run.steps)
        for score in dict.fromkeys(("avg", design.score)):
            _check_score(study, members, score)
        identified = [run for run in members if "validation" in run.data]
        _check(study, identified, "held-out questions", lambda run: f"those with sha256 {run.data['validation'][:12]}")
        _check(study, members, "number of samples per question", lambda run: run.samples)
    return [
        Condition(
            name,
            {arm: Arm.of(arm, arms[arm], design) for arm in sorted(arms, key=design.order)},
            design.score,
        )
        for name, arms in grouped.items()
    ]


def _check_score(study: str, runs: list[RunRecord], score: Score) -> None:
    tables = {id(run): measures.score_table(run, score) for run in runs}
    _check(study, runs, "steps with an evaluation", lambda run: measures.evaluations(run, score))
    _check(
        study,
        runs,
        "number of held-out questions",
        lambda run: sorted({len(row) for row in tables[id(run)].values()}),
    )
    if broken := [run for run in runs if not np.isfinite(measures.answers(run, score)).all()]:
        raise ValueError(f"Expected a finite score of every held-out question, but got none in {_names(broken)}.")


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


def mean_arm(arms: list[Arm]) -> Arm:
    """Return the mean of several arms on their common seeds, as an arm without runs."""
    seeds = sorted(set.intersection(*(set(arm.seeds) for arm in arms)))
    parts = [(arm, arm.rows(seeds)) for arm in arms]
    return Arm(
        name=f"mean of {', '.join(arm.name for arm in arms)}",
        seeds=seeds,
        base=np.mean([arm.base[rows] for arm, rows in parts], axis=0),
        tables={measure: np.mean([arm.tables[measure][rows] for arm, rows in parts], axis=0) for measure in MEASURES},
        collapsed=[None] * len(seeds),
    )


def controls_of(condition: Condition, design: Design, arm: str, kinds: tuple[str, ...]) -> list[Arm]:
    """Return the controls of an information arm that the condition has, of these kinds."""
    names = [design.control(kind, arm) for kind in kinds]
    return [condition.arms[name] for name in names if name in condition.arms]


def information_arms(condition: Condition, design: Design) -> list[str]:
    """Return the names of the information arms that have at least one decisive control."""
    return [
        name
        for name in condition.arms
        if design.suffix(name) is not None and controls_of(condition, design, name, design.required)
    ]


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
