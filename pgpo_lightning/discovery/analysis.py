"""Compares methods by their discovery times: curves, intervals, differences from a baseline, log-rank tests, predictions."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from pgpo_lightning.discovery.outcomes import AXES, Outcome
from pgpo_lightning.discovery.spec import Prediction
from pgpo_lightning.discovery.survival import Array, Curve, Resamples, interval, kaplan_meier
from pgpo_lightning.studies.inference import holm

DRAWS = 2000
POINTS = 40
"""Points of a curve in the content and in the picture."""


def analyse(
    outcomes: Sequence[Outcome], baseline: str, budget: int, predictions: Sequence[Prediction] = (), draws: int = DRAWS
) -> dict[str, Any]:
    """Return the content of a report.

    Args:
        outcomes: Of all runs that made at least one attempt.
        baseline: The method that the others are compared with; without runs of it there are no comparisons.
        budget: Attempts of a run.
        predictions: What was expected.
        draws: Resamples of questions and seeds.

    Raises:
        ValueError: If there are no runs.
    """
    if not outcomes:
        raise ValueError("Expected runs with at least one attempt, but there are none yet.")
    methods = list(dict.fromkeys(each.method for each in outcomes))
    questions = sorted({each.question for each in outcomes})
    seeds = sorted({each.seed for each in outcomes})
    resamples = Resamples(questions, seeds, draws)
    groups = {name: [each for each in outcomes if each.method == name] for name in methods}
    horizons = {axis: _horizon(groups, axis, budget) for axis in AXES}
    curves = {name: {axis: _curves(runs, axis, resamples) for axis in AXES} for name, runs in groups.items()}
    rest = [name for name in methods if name != baseline] if baseline in methods else []
    comparisons = [_comparison(name, baseline, groups, curves, horizons) for name in rest]
    for axis in AXES:
        for row, p in zip(comparisons, holm([row[axis]["p"] for row in comparisons]), strict=True):
            row[axis]["p_holm"] = p
    at = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if k < budget} | {budget})
    return {
        "budget": budget,
        "baseline": baseline,
        "questions": questions,
        "seeds": seeds,
        "draws": draws,
        "horizons": horizons,
        "methods": [_method(name, groups[name], curves[name], horizons, at) for name in methods],
        "comparisons": comparisons,
        "by_question": [_by_question(question, groups) for question in questions],
        "predictions": [_predicted(prediction, curves, budget) for prediction in predictions],
    }


def log_rank(first: Sequence[Outcome], second: Sequence[Outcome], axis: str) -> float:
    """Return the p-value of the log-rank test that two methods have the same discovery times, stratified by question.

    Runs of one question and seed begin with the same draws, which makes their times more alike than the test assumes.

    Args:
        first: Runs of one method.
        second: Runs of the other.
        axis: What is spent.

    Returns:
        NaN where neither method has a success, and where all runs at risk succeed at the same times.

    Raises:
        ModuleNotFoundError: Without statsmodels, the extra `studies`.
    """
    from statsmodels.duration.survfunc import survdiff

    both = [*first, *second]
    if not any(each.found for each in both):
        return float("nan")
    group = np.repeat([0, 1], [len(first), len(second)])
    times = np.array([each.spent[axis] for each in both])
    found = np.array([each.found for each in both], dtype=int)
    # Questions that one method alone has, or that nobody solves, say nothing, and statsmodels divides by their variance of 0.
    strata = np.array([each.question for each in both])
    kept = np.isin(
        strata, [q for q in np.unique(strata) if found[strata == q].any() and len({*group[strata == q]}) == 2]
    )
    if not kept.any():
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"), suppress(np.linalg.LinAlgError):  # of a variance of 0
        return float(survdiff(times[kept], found[kept], group[kept], strata=strata[kept])[1])
    return float("nan")


def _horizon(groups: dict[str, list[Outcome]], axis: str, budget: int) -> float:
    """Return up to where all methods are compared: the budget, or the smallest of the longest times of each method."""
    if axis == "generations":
        return float(budget)
    return min(max(each.spent[axis] for each in runs) for runs in groups.values())


def _curves(runs: list[Outcome], axis: str, resamples: Resamples) -> tuple[Curve, Curve]:
    """Return the estimate and its resamples."""
    times = np.array([each.spent[axis] for each in runs])
    found = np.array([each.found for each in runs])
    weights = resamples.weights([each.question for each in runs], [each.seed for each in runs])
    return kaplan_meier(times, found), kaplan_meier(times, found, weights)


def _estimate(value: Array, draws: Array) -> dict[str, float]:
    low, high = interval(draws)
    return {"value": float(value[0]), "low": low, "high": high}


def _method(
    name: str, runs: list[Outcome], curves: dict[str, tuple[Curve, Curve]], horizons: dict[str, float], at: list[int]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": name,
        "runs": len(runs),
        "complete": sum(each.complete for each in runs),
        "found": sum(each.found for each in runs),
    }
    one, drawn = curves["generations"]
    content["discovery_at"] = {str(k): _estimate(one.discovery(float(k)), drawn.discovery(float(k))) for k in at}
    for axis in AXES:
        one, drawn = curves[axis]
        grid = np.linspace(0, horizons[axis], POINTS + 1)
        low, high = np.nanquantile(drawn.discovery(grid), [0.025, 0.975], axis=0)
        content[axis] = {
            "mean": _estimate(one.restricted_mean(horizons[axis]), drawn.restricted_mean(horizons[axis])),
            "median": float(one.median()[0]),
            "curve": {
                "at": grid.tolist(),
                "value": one.discovery(grid)[0].tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
            },
        }
    return content


def _comparison(
    name: str,
    baseline: str,
    groups: dict[str, list[Outcome]],
    curves: dict[str, dict[str, tuple[Curve, Curve]]],
    horizons: dict[str, float],
) -> dict[str, Any]:
    content: dict[str, Any] = {"method": name, "against": baseline}
    for axis in AXES:
        (mine, my_draws), (its, its_draws) = curves[name][axis], curves[baseline][axis]
        end = horizons[axis]
        content[axis] = {
            "difference": _estimate(
                mine.discovery(end) - its.discovery(end), my_draws.discovery(end) - its_draws.discovery(end)
            ),
            "ratio": _estimate(
                mine.restricted_mean(end) / its.restricted_mean(end),
                my_draws.restricted_mean(end) / its_draws.restricted_mean(end),
            ),
            "p": log_rank(groups[name], groups[baseline], axis),
        }
    return content


def _by_question(question: int, groups: dict[str, list[Outcome]]) -> dict[str, Any]:
    row: dict[str, Any] = {"question": question}
    for name, runs in groups.items():
        own = [each for each in runs if each.question == question]
        row[name] = {"found": sum(each.found for each in own), "runs": len(own)}
    return row


def _predicted(
    prediction: Prediction, curves: dict[str, dict[str, tuple[Curve, Curve]]], budget: int
) -> dict[str, Any]:
    at = float(prediction.at or budget)
    content: dict[str, Any] = vars(prediction) | {"at": int(at), "interval": list(prediction.interval), "seen": None}
    if {prediction.method, prediction.against} <= curves.keys():
        (mine, my_draws), (its, its_draws) = (curves[n]["generations"] for n in (prediction.method, prediction.against))
        seen = _estimate(mine.discovery(at) - its.discovery(at), my_draws.discovery(at) - its_draws.discovery(at))
        content |= {"seen": seen, "inside": prediction.interval[0] <= seen["value"] <= prediction.interval[1]}
    return content
