"""Does information help beyond its dose? The answer of one information arm from its differences to its matched controls.

- `yes`: on every deciding measure the arm exceeds every decisive control, and no decisive control is missing. The hypothesis that
  it fails somewhere is rejected only if every single test rejects (intersection-union test, Berger 1982), so each test has the
  full level and nothing is corrected for the number of controls.
- `equivalent`: not `yes`, and on every deciding measure the difference to the mean of the exchangeable controls is within the
  margin (two one-sided tests).
- `no`: neither, and on some deciding measure that difference is below the margin: a gain of interest over all of them is
  excluded, because the smallest of several gains is at most their mean. The level is divided by the number of measures.
- `not resolved`: none of these.

The level is one-sided, 0.025 for one arm under one condition, divided by the number of arms and conditions that are asked
together (Bonferroni). In a study with planned looks it is the level of the look.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pgpo_lightning.studies.comparisons import Arm, Condition, controls_of, information_arms, mean_arm
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Mean, Table, two_way
from pgpo_lightning.studies.measures import Measure
from pgpo_lightning.studies.sample_size import NEEDS, needs
from pgpo_lightning.studies.sequential import SequentialPlan

Answer = Literal["yes", "equivalent", "no", "not resolved"]
"""Whether information helps beyond its dose."""

ONE_SIDED = 0.025
"""Error rate of an answer."""

NOTHING = Mean(math.nan, math.nan, math.nan, math.nan, 0, 0)
"""The difference between arms without a common seed."""


@dataclass(frozen=True)
class Question:
    """What is asked of one information arm: its differences to its decisive controls, under one condition or pooled.

    Attributes:
        arm: The information arm.
        controls: Name of each decisive control that is there, to its differences: each measure, ``(seeds, questions)``.
        averaged: The same for the mean of the exchangeable controls.
        averages: Names of the controls in that mean.
        missing: Names of the decisive controls that are not there.
    """

    arm: str
    controls: Mapping[str, Mapping[Measure, Table]]
    averaged: Mapping[Measure, Table]
    averages: tuple[str, ...]
    missing: tuple[str, ...] = ()


def question(
    condition: Condition,
    design: Design,
    arm: str,
    kinds: tuple[str, ...] | None = None,
    seeds: list[int] | None = None,
) -> Question:
    """Return what is asked of an information arm that has at least one decisive control.

    Args:
        condition: The condition.
        design: What is compared.
        arm: The information arm.
        kinds: Use these of the decisive controls only.
        seeds: Use these seeds only; by default those that the arm shares with each control.
    """
    kinds = design.required if kinds is None else kinds
    own, controls = condition.arms[arm], controls_of(condition, design, arm, kinds)
    names = [control.name for control in controls]
    wanted = [design.control(kind, arm) for kind in design.required]
    exchangeable = tuple(kind for kind in kinds if kind in design.exchangeable)
    averages = controls_of(condition, design, arm, exchangeable) or controls
    return Question(
        arm,
        {control.name: differences(own, control, design.measures, seeds) for control in controls},
        differences(own, mean_arm(averages), design.measures, seeds),
        tuple(control.name for control in averages),
        tuple(name for name in wanted if name not in names),
    )


def differences(a: Arm, b: Arm, measures: tuple[Measure, ...], seeds: list[int] | None = None) -> dict[Measure, Table]:
    """Return the scores of `a` minus those of `b` on common seeds, for each measure ``(seeds, questions)``."""
    both = sorted(set(a.seeds) & set(b.seeds) & set(a.seeds if seeds is None else seeds))
    return {measure: a.tables[measure][a.rows(both)] - b.tables[measure][b.rows(both)] for measure in measures}


def decide(
    asked: list[Question], design: Design, plan: SequentialPlan | None = None, family: int = 0
) -> dict[str, Any]:
    """Answer the questions of one family.

    Args:
        asked: The questions.
        design: For margin and measures.
        plan: The looks of the study, if it has any.
        family: Number of questions in the family, where it is larger than those that are asked here.

    Returns:
        `answer`: `yes` if it is that of any arm, else `not resolved` if it is that of any arm, else `equivalent` if it is that
        of all arms, else `no`; None if nothing is asked. `arms`: of each, :func:`decide_arm` and :func:`sample_size`.
    """
    family = max(1, family or len(asked))
    arms = [decide_arm(each, design, plan, family) for each in asked]
    arms = [arm | sample_size(each, design, family, arm["answer"]) for arm, each in zip(arms, asked, strict=True)]
    found = {arm["answer"] for arm in arms}
    order: tuple[Answer, ...] = ("yes", "not resolved", "no", "equivalent")
    return {"answer": next((answer for answer in order if answer in found), None), "family": family, "arms": arms}


def decide_arm(asked: Question, design: Design, plan: SequentialPlan | None = None, family: int = 1) -> dict[str, Any]:
    """Answer the question of one information arm.

    Args:
        asked: The question.
        design: For margin and measures.
        plan: The looks of the study, if it has any.
        family: Number of questions in the family.

    Returns:
        `answer`; `missing` controls; `seeds`; the one-sided `level` (0 between looks); `p`, the largest p-value of all
        comparisons (the intersection-union test); `p_equivalent`; `comparisons`, one row for each control and measure with its
        interval and p-value; `averaged`, one row for each measure. Missing numbers are NaN.
    """
    averaged = {measure: estimate(table) for measure, table in asked.averaged.items()}
    each = {
        (name, measure): estimate(table) for name, tables in asked.controls.items() for measure, table in tables.items()
    }
    seeds = min(mean.seeds for mean in [*averaged.values(), *each.values()])
    alpha = ONE_SIDED / family
    level = alpha if plan is None else plan.level(seeds, alpha)
    p = [mean.p_above() for mean in each.values()]
    equivalent = [mean.p_within(design.margin) for mean in averaged.values()]
    below = [mean.p_below(design.margin) for mean in averaged.values()]
    answer: Answer = "not resolved"
    # A NaN is never below a level, and between looks the level is 0.
    if not asked.missing and all(value < level for value in p):
        answer = "yes"
    elif all(value < level for value in equivalent):
        answer = "equivalent"
    elif any(value < level / len(below) for value in below):
        answer = "no"
    return {
        "arm": asked.arm,
        "answer": answer,
        "missing": list(asked.missing),
        "averages": list(asked.averages),
        "seeds": seeds,
        "level": level,
        "p": float(np.max(p)),
        "p_equivalent": float(np.max(equivalent)),
        "comparisons": [
            {"control": name, "measure": measure} | _row(mean, level, value)
            for ((name, measure), mean), value in zip(each.items(), p, strict=True)
        ],
        "averaged": [
            {"measure": measure, "p_equivalent": same, "p_no": less} | _row(mean, level, mean.p_above())
            for (measure, mean), same, less in zip(averaged.items(), equivalent, below, strict=True)
        ],
    }


def estimate(table: Table) -> Mean:
    """Return the mean of paired differences; :data:`NOTHING` without common seeds."""
    return two_way(table) if len(table) else NOTHING


def _row(mean: Mean, level: float, p: float) -> dict[str, Any]:
    # Identical runs have no variance from which an interval could be computed, and between looks there is no interval.
    low, high = mean.interval(1 - 2 * level) if mean.error and level else (math.nan, math.nan)
    return {"seeds": mean.seeds, "value": mean.value, "low": low, "high": high, "p": p}


def sample_size(asked: Question, design: Design, family: int, answer: Answer) -> dict[str, Any]:
    """Return the sample sizes of :func:`pgpo_lightning.studies.sample_size.needs`: for each the largest of all measures.

    Args:
        asked: The question.
        design: For margin and measures.
        family: Number of questions in the family.
        answer: Only one that is not resolved needs more.
    """
    if answer != "not resolved":
        return dict.fromkeys(NEEDS)
    level = 1 - 2 * ONE_SIDED / family
    found = [needs(estimate(table), design.margin, level) for table in asked.averaged.values()]
    return {name: max((each[name] for each in found if each[name]), default=None, key=_size) for name in NEEDS}


def _size(need: int | tuple[int, int | None]) -> tuple[float, ...]:
    limits = (need,) if isinstance(need, int) else need
    return tuple(math.inf if limit is None else limit for limit in limits)


def decide_conditions(
    groups: list[Condition], design: Design, plan: SequentialPlan | None = None
) -> dict[str, dict[str, Any]]:
    """Answer under each condition; all conditions and information arms together are one family."""
    asked = {
        condition.name: [question(condition, design, arm) for arm in information_arms(condition, design)]
        for condition in groups
    }
    family = sum(map(len, asked.values()))
    return {name: decide(each, design, plan, family) for name, each in asked.items()}
