"""Several conditions: does the difference depend on the condition, and which conditions may be averaged?

The rule is set before the results are known: conditions in which the baseline learns, and which have the same held-out questions.
It reads the baseline alone, so it does not depend on the differences that are averaged.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pgpo_lightning.studies.comparisons import Condition, controls_of, information_arms
from pgpo_lightning.studies.decisions import Question, decide, estimate, question
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table, holm, two_way
from pgpo_lightning.studies.measures import Measure
from pgpo_lightning.studies.sequential import SequentialPlan


def learning(condition: Condition, design: Design) -> dict[str, Any]:
    """Return whether the baseline learns: the interval of its final score minus its score at the first evaluation is above 0.

    Returns:
        `study`, `value`, `low`, `high` and `learns`; only `study` and `learns` without the baseline.
    """
    baseline = condition.arms.get(design.baseline)
    if baseline is None:
        return {"study": condition.name, "learns": False}
    mean = two_way(baseline.tables["final"] - baseline.base)
    low, high = mean.interval()
    return {"study": condition.name, "value": mean.value, "low": low, "high": high, "learns": low > 0}


def poolable(groups: list[Condition], design: Design) -> list[Condition]:
    """Return the conditions that are pooled, by the rule of the design; none if their held-out questions differ."""
    chosen = [group for group in groups if design.pool == "all" or learning(group, design)["learns"]]
    return chosen if len({group.identity for group in chosen}) == 1 else []


def aligned(groups: list[Condition], design: Design, arm: str) -> list[Question]:
    """Return the question of an information arm under several conditions, on the controls and seeds that all of them have.

    Differences are thus about the same controls everywhere. Empty if there is no such control.
    """
    kinds = tuple(kind for kind in design.required if all(controls_of(group, design, arm, (kind,)) for group in groups))
    if not kinds or any(arm not in group.arms for group in groups):
        return []
    members = [member for group in groups for member in (group.arms[arm], *controls_of(group, design, arm, kinds))]
    seeds = sorted(set.intersection(*(set(member.seeds) for member in members)))
    return [question(group, design, arm, kinds, seeds) for group in groups]


def pooled_questions(groups: list[Condition], design: Design) -> list[Question]:
    """Return what is asked of the mean over conditions with equal weights.

    Args:
        groups: Conditions with the same held-out questions; none gives no question.
        design: What is compared.
    """
    found = []
    for arm in dict.fromkeys(name for group in groups for name in information_arms(group, design)):
        if each := aligned(groups, design, arm):
            first = each[0]
            controls = {name: _mean(one.controls[name] for one in each) for name in first.controls}
            averaged = _mean(one.averaged for one in each)
            found.append(Question(arm, controls, averaged, first.averages, first.missing))
    return found


def _mean(each: Iterable[Mapping[Measure, Table]]) -> dict[Measure, Table]:
    tables = list(each)
    return {measure: np.mean([one[measure] for one in tables], axis=0) for measure in tables[0]}


def pooled(groups: list[Condition], design: Design, plan: SequentialPlan | None = None) -> dict[str, Any]:
    """Answer for the conditions that may be pooled.

    Returns:
        As :func:`pgpo_lightning.studies.decisions.decide`, and `studies`, the names of the conditions. This answer is the
        primary one: its family is the information arms alone.
    """
    chosen = poolable(groups, design)
    return {"studies": [group.name for group in chosen]} | decide(pooled_questions(chosen, design), design, plan)


def interaction(groups: list[Condition], design: Design) -> list[dict[str, Any]]:
    """Test whether the difference between an information arm and the mean of its exchangeable controls depends on the condition.

    Differences are paired by seed and by question, so only conditions with the same questions are compared.

    Args:
        groups: All conditions.
        design: What is compared; the test is on the first of its measures.

    Returns:
        For each information arm and pair of conditions: the `value` of the first minus the second with its 95 % interval, `p`,
        and `p_holm`, corrected for the pairs of this arm. The smallest `p_holm` of an arm tests that all conditions are alike.
    """
    measure = design.measures[0]
    rows: list[dict[str, Any]] = []
    for arm in dict.fromkeys(name for group in groups for name in information_arms(group, design)):
        found: list[dict[str, Any]] = []
        for first, second in combinations(groups, 2):
            both = aligned([first, second], design, arm) if first.identity == second.identity else []
            if both:
                a, b = both
                mean = estimate(a.averaged[measure] - b.averaged[measure])
                low, high = mean.interval()
                row: dict[str, Any] = {
                    "arm": arm,
                    "controls": list(a.averages),
                    "first": first.name,
                    "second": second.name,
                }
                row |= {"measure": measure, "seeds": mean.seeds, "value": mean.value, "low": low, "high": high}
                found.append(row | {"p": mean.p()})
        corrected = holm([row["p"] for row in found])
        rows += [row | {"p_holm": p} for row, p in zip(found, corrected, strict=True)]
    return rows
