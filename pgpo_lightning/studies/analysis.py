"""Numbers of a report from the records of many runs: measures, paired differences, doses and answers."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.collapse_shares import collapsed_share, compare_collapse
from pgpo_lightning.studies.comparisons import Arm, Condition, common, conditions, pairs
from pgpo_lightning.studies.decisions import NOTHING, decide_conditions, differences, estimate
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Table, holm, pigeonhole, two_way
from pgpo_lightning.studies.measures import MEASURES
from pgpo_lightning.studies.pooling import interaction, learning, pooled
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.tuned import tuned

DOSE_TOLERANCE = 0.01
"""Largest relative difference between a control's mean dose and that of its information arm."""

FEW_SEEDS = 5
"""With fewer seeds than this a report has a warning."""


def analyse(runs: list[RunRecord], design: Design, plan: SequentialPlan | None = None) -> dict[str, Any]:
    """Compute the content of a report.

    Args:
        runs: Of one or more conditions. A report calls each condition a study.
        design: What is compared.
        plan: The looks of the study, if it has any.

    Returns:
        The content of `report.json`. `studies`, each with `arms`, `comparisons`, `collapse`, `doses`, `answers` and `multipliers`
        (whether any run had one). With several conditions also `interaction`, `learning`, `pooled` and `tuned`, see the modules
        of these names, else None. Missing numbers are NaN.

    Raises:
        ValueError: As :func:`pgpo_lightning.studies.comparisons.conditions`.
    """
    groups = conditions(runs, design)
    answers = decide_conditions(groups, design, plan)
    several = len(groups) > 1
    return {
        "design": asdict(design),
        "sequential": asdict(plan) if plan else None,
        "interaction": interaction(groups, design) if several else None,
        "learning": [learning(group, design) for group in groups] if several else None,
        "pooled": pooled(groups, design, plan) if several else None,
        "tuned": tuned(groups, design) if several else None,
        "studies": [_condition(group, design) | {"answers": answers[group.name]} for group in groups],
        "cost": {
            "runs": len(runs),
            "seconds": math.fsum(run.seconds for run in runs),
            "cpu_seconds": math.fsum(run.cpu_seconds for run in runs),
        },
    }


def _condition(condition: Condition, design: Design) -> dict[str, Any]:
    compared = list(pairs(condition, design))
    rows: list[dict[str, Any]] = [
        {"arm": a.name, "against": b.name, "kind": kind, "seeds": len(common(a, b))} for a, b, kind in compared
    ]
    tables = [differences(a, b, MEASURES) for a, b, _ in compared]
    for measure in MEASURES:
        means = [estimate(each[measure]) for each in tables]
        p = [mean.p() for mean in means]
        for row, mean, each, own, corrected in zip(rows, means, tables, p, holm(p), strict=True):
            row[measure] = _estimate(each[measure], design)
            row[measure] |= {"p": own, "p_holm": corrected, "deviation": mean.deviation}
    return {
        "study": condition.name,
        "steps": condition.first.steps,
        "evaluations": condition.steps,
        "questions": condition.questions,
        "samples": condition.first.samples,
        "seeds": condition.seeds,
        "multipliers": condition.multipliers,
        "arms": [_arm(arm, design) for arm in condition.arms.values()],
        "comparisons": rows,
        "collapse": compare_collapse(condition, design),
        "doses": [_doses(a, b) for a, b, kind in compared if kind != "baseline"],
        "notes": _notes(condition, design),
    }


def _estimate(table: Table, design: Design) -> dict[str, Any]:
    mean = estimate(table)
    low, high = mean.interval()
    result: dict[str, Any] = {"value": mean.value, "low": low, "high": high}
    if design.draws:
        result["bootstrap"] = list(pigeonhole(table, design.draws))
    return result


def _arm(arm: Arm, design: Design) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "seeds": len(arm.runs),
        "base": _estimate(arm.base, design),
        **{measure: _estimate(arm.tables[measure], design) for measure in MEASURES},
        "collapsed": collapsed_share(arm, design.measures[0]),
        "length": _over_seeds([measures.at_the_end(run, measures.LENGTH) for run in arm.runs]),
        "entropy": _over_seeds([measures.at_the_end(run, measures.ENTROPY) for run in arm.runs]),
        "dose": _over_seeds(list(arm.doses)),
    }


def _over_seeds(values: list[float]) -> dict[str, float]:
    """Return mean and interval of one number per seed. Seeds without the number do not count."""
    finite = np.array([value for value in values if math.isfinite(value)])
    mean = two_way(finite[:, None]) if len(finite) else NOTHING
    low, high = mean.interval()
    return {"value": mean.value, "low": low, "high": high}


def _doses(arm: Arm, control: Arm) -> dict[str, Any]:
    """Compare the mean multipliers of an information arm and a control, on common seeds."""
    seeds = common(arm, control)
    own, other = arm.doses[arm.rows(seeds)], control.doses[control.rows(seeds)]
    row = {"arm": arm.name, "control": control.name, "seeds": len(seeds)}
    if not seeds:
        return row | {
            "dose": math.nan,
            "control_dose": math.nan,
            "ratio": math.nan,
            "farthest": math.nan,
            "matched": False,
        }
    each = other / own
    ratio = float(other.mean() / own.mean())
    return row | {
        "dose": float(own.mean()),
        "control_dose": float(other.mean()),
        "ratio": ratio,
        "farthest": float(each[np.abs(each - 1).argmax()]),
        "matched": abs(ratio - 1) <= DOSE_TOLERANCE,
    }


def _notes(condition: Condition, design: Design) -> list[str]:
    """Return what a reader has to know about the runs that are present, and about those that are missing."""
    notes = [
        f"{arm.name} has no seed {', '.join(missing)}: its differences are on the common seeds."
        for arm in condition.arms.values()
        if (missing := [str(seed) for seed in condition.seeds if seed not in arm.seeds])
    ]
    if len(condition.seeds) == 1:
        notes.append("A single seed: the variance between seeds is unknown, so there are no intervals.")
    elif len(condition.seeds) < FEW_SEEDS:
        notes.append(
            f"Fewer than {FEW_SEEDS} seeds: their variance is poorly known, and an answer depends on the assumptions."
        )
    notes += [
        f"{a.name} and {b.name} gave the same answers in every run: the variance of their difference is unknown."
        for a, b, _ in pairs(condition, design)
        if common(a, b) and not any(table.any() for table in differences(a, b, MEASURES).values())
    ]
    if design.baseline not in condition.arms:
        notes.append(
            f"There is no arm {design.baseline}, so there are no differences to a baseline. Choose another one with `--baseline` "
            f"({', '.join(condition.arms)})."
        )
    informed = [name for name in condition.arms if design.suffix(name) is not None]
    if not informed:
        notes.append(f"There is no information arm ({', '.join(design.information)}).")
    absent = {
        name: [control for kind in design.required if (control := design.control(kind, name)) not in condition.arms]
        for name in informed
    }
    if alone := [name for name, controls in absent.items() if len(controls) == len(design.required)]:
        notes.append(f"No control of the same dose, and therefore no answer, for: {', '.join(alone)}.")
    notes += [
        f"{name} has no {', '.join(controls)}: without every decisive control its answer cannot be yes."
        for name, controls in absent.items()
        if controls and name not in alone
    ]
    if condition.steps[0] != 0:
        notes.append(
            f"There is no evaluation at step 0: the one at step {condition.steps[0]} is used for the base model."
        )
    elif different := _different_bases(condition):
        notes.append(
            f"Before the first step the arms give different answers with the same seed ({', '.join(map(str, different))}): other "
            "held-out questions, another model, or another machine. Pairing then removes less variance."
        )
    runs = [run for arm in condition.arms.values() for run in arm.runs]
    if 0 < (unknown := sum("validation" not in run.data for run in runs)) < len(runs):
        notes.append(
            f"The records of {unknown} of {len(runs)} runs do not identify their held-out questions: for these runs only the "
            "number of questions was compared."
        )
    if condition.steps[-1] < condition.first.steps:
        notes.append(
            f"No run was evaluated after its last step, {condition.first.steps}: `final` is the score after step "
            f"{condition.steps[-1]}."
        )
    return notes


def _different_bases(condition: Condition) -> list[int]:
    """Return the seeds whose runs do not start with the same answers. Evaluation is seeded, so they should."""
    bases: dict[int, set[bytes]] = {}
    for arm in condition.arms.values():
        for seed, scores in zip(arm.seeds, arm.base, strict=True):
            bases.setdefault(seed, set()).add(scores.tobytes())
    return sorted(seed for seed, found in bases.items() if len(found) > 1)
