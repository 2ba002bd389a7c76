"""Collapsed runs, apart from the scores: exact intervals and tests of their shares, and the mean of the runs that live.

A mean over runs of which a few collapse is neither the score of a run that lives nor of one that collapses, and its interval
covers less than it says (`python -m benchmarks.study_simulation`). So the two parts are reported as well: how often runs
collapse, and how well the others do. The second part compares selected runs: an arm that loses its weak runs looks better there.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import binomtest, fisher_exact

from pgpo_lightning.studies.comparisons import Arm, Condition, common, pairs
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table, exact_interval, two_way
from pgpo_lightning.studies.measures import Measure


def collapsed_share(arm: Arm, measure: Measure) -> dict[str, Any]:
    """Return how many runs of an arm collapsed, and the score of the others.

    Returns:
        `count`, `share` with its exact interval `low` and `high` (Clopper and Pearson 1934), the median `step` of the first
        collapse, `steps` of each seed, and `living`: the mean score of the other runs with its interval.
    """
    steps = [step for step in arm.collapsed if step is not None]
    low, high = exact_interval(len(steps), len(arm.seeds))
    return {
        "count": len(steps),
        "share": len(steps) / len(arm.seeds),
        "low": low,
        "high": high,
        "step": float(np.median(steps)) if steps else math.nan,
        "steps": dict(zip(map(str, arm.seeds), arm.collapsed, strict=True)),
        "living": _estimate(arm.tables[measure][[step is None for step in arm.collapsed]]),
    }


def compare_collapse(condition: Condition, design: Design) -> list[dict[str, Any]]:
    """Compare the shares of collapsed runs of each pair of arms, and the scores of the seeds on which both live.

    Returns:
        For each pair: `collapsed` and `runs` of both; `test` and its two-sided p-value; `living`, the mean difference with its
        interval and its number of seeds. The test is McNemar's exact one, paired by seed, if the arms have the same seeds, and
        Fisher's exact one otherwise.
    """
    measure = design.measures[0]
    rows = []
    for a, b, _ in pairs(condition, design):
        seeds = common(a, b)
        own, other = _lost(a), _lost(b)
        if a.seeds == b.seeds:
            test = "McNemar"
            p = mcnemar(int((own & ~other).sum()), int((other & ~own).sum()))
        else:
            test = "Fisher"
            p = _fisher(int(own.sum()), len(own), int(other.sum()), len(other))
        living = ~own[a.rows(seeds)] & ~other[b.rows(seeds)]
        table = a.tables[measure][a.rows(seeds)] - b.tables[measure][b.rows(seeds)]
        rows.append(
            {
                "arm": a.name,
                "against": b.name,
                "collapsed": [int(own.sum()), int(other.sum())],
                "runs": [len(own), len(other)],
                "test": test,
                "p": p,
                "living": _estimate(table[living]),
            }
        )
    return rows


def mcnemar(first: int, second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        first: Pairs in which only the first run collapsed.
        second: Pairs in which only the second run collapsed.

    Example:
        >>> mcnemar(6, 0), mcnemar(0, 0)
        (0.03125, 1.0)
    """
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


@lru_cache(maxsize=4096)
def _fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    return float(fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)


def _lost(arm: Arm) -> np.ndarray:
    return np.array([step is not None for step in arm.collapsed], dtype=bool)


def _estimate(table: Table) -> dict[str, Any]:
    if not len(table):
        return {"seeds": 0, "value": math.nan, "low": math.nan, "high": math.nan}
    mean = two_way(table)
    low, high = mean.interval()
    return {"seeds": mean.seeds, "value": mean.value, "low": low, "high": high}
