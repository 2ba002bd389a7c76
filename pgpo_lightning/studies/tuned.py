"""Tuned against tuned: each arm under its own best condition, chosen without the seed that it is scored on.

The condition with the best mean score, reported with that same score, is biased upwards, more for arms with more noise. Here the
condition of seed `s` is the best one on the mean over all *other* seeds (leave-one-seed-out), and only seed `s` is scored there.
The score is that of choosing a learning rate with one seed less, without this bias. The held-out questions are the same in both
parts: what is peculiar to them is not removed.
"""

from collections import Counter
from typing import Any

import numpy as np

from pgpo_lightning.studies.comparisons import Arm, Condition, pairs
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table, two_way


def tuned(groups: list[Condition], design: Design) -> dict[str, Any]:
    """Compare arms, each under its own best condition.

    Args:
        groups: All conditions.
        design: What is compared; on the first of its measures.

    Returns:
        `measure`; `arms`, each with its score, interval, and `chosen`, how many seeds each condition was chosen for;
        `comparisons`, paired by seed and question. Both are empty with a single condition, with other held-out questions under
        some condition, or with fewer than three common seeds. Arms that are not under all conditions have fewer to choose from.
    """
    measure = design.measures[0]
    content: dict[str, Any] = {"measure": measure, "arms": [], "comparisons": []}
    if len(groups) < 2 or len({group.identity for group in groups}) > 1:
        return content
    members: dict[str, list[tuple[str, Arm]]] = {}
    for group in groups:
        for name, arm in group.arms.items():
            members.setdefault(name, []).append((group.name, arm))
    scores: dict[str, tuple[list[int], Table]] = {}
    for name in sorted(members, key=design.order):
        seeds = sorted(set.intersection(*(set(arm.seeds) for _, arm in members[name])))
        if len(seeds) < 3:
            continue
        table, chosen = _leave_one_out([arm.tables[measure][arm.rows(seeds)] for _, arm in members[name]])
        scores[name] = seeds, table
        counts = Counter(members[name][i][0] for i in chosen)
        content["arms"].append({"arm": name, "seeds": len(seeds), "chosen": dict(counts)} | _interval(table))
    compared = dict.fromkeys((a.name, b.name) for group in groups for a, b, _ in pairs(group, design))
    for first, second in compared:
        if first in scores and second in scores:
            (own, a), (other, b) = scores[first], scores[second]
            common = [seed for seed in own if seed in other]
            if len(common) > 1:
                table = a[[own.index(seed) for seed in common]] - b[[other.index(seed) for seed in common]]
                content["comparisons"].append(
                    {"arm": first, "against": second, "seeds": len(common)} | _interval(table)
                )
    return content


def _leave_one_out(tables: list[Table]) -> tuple[Table, list[int]]:
    """Return each seed's scores under the condition that is best for the others, and the index of that condition."""
    means = np.array([table.mean(axis=1) for table in tables])  # (conditions, seeds)
    chosen = ((means.sum(axis=1, keepdims=True) - means).argmax(axis=0)).tolist()  # the first one if several are equal
    return np.array([tables[condition][seed] for seed, condition in enumerate(chosen)]), chosen


def _interval(table: Table) -> dict[str, Any]:
    mean = two_way(table)
    low, high = mean.interval()
    return {"value": mean.value, "low": low, "high": high, "p": mean.p()}
