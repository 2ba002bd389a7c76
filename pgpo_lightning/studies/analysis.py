"""Numbers of a report from the records of many runs: measures, paired differences, doses and answers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgpo_lightning.monitoring.collapse_rules import collapse_step
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.comparisons import Arm, Condition, Design, common, conditions, paired, pairs
from pgpo_lightning.studies.inference import (
    Answer,
    Mean,
    Table,
    answer,
    holm,
    pigeonhole,
    questions_for,
    seeds_for,
    two_way,
    wilson_interval,
)
from pgpo_lightning.studies.measures import MEASURES, Measure

DOSE_TOLERANCE = 0.01
"""Largest relative difference between a control's mean dose and that of its information arm."""

FEW_SEEDS = 5
"""With fewer seeds than this a report has a warning."""

ERROR_RATE = 0.05
"""Of an interval, and of all answers of one family together."""

NEEDS = ("seeds_needed", "seeds_if_seen", "questions_needed")
"""Sample sizes that would resolve an answer; see :func:`decide`."""

NOTHING = Mean(math.nan, math.nan, math.nan, math.nan, 0, 0)
"""The difference between arms without a common seed."""


def analyse(runs: list[RunRecord], design: Design) -> dict[str, Any]:
    """Compute the content of a report.

    Args:
        runs: Of one or more conditions. A report calls each condition a study.
        design: What is compared.

    Returns:
        The content of `report.json`. `studies`, each with `arms`, `comparisons`, `doses`, `answers` and `multipliers` (whether
        any run had one); `pooled`, the answers over all studies, or None for a single one. Missing numbers are NaN.

    Raises:
        ValueError: As :func:`pgpo_lightning.studies.comparisons.conditions`.
    """
    groups = conditions(runs, design)
    return {
        "design": design.__dict__
        | {name: list(getattr(design, name)) for name in ("information", "controls", "decisive")},
        "studies": [_condition(condition, design) for condition in groups],
        "pooled": {m: _pooled(groups, design, m) for m in MEASURES} if len(groups) > 1 else None,
        "cost": {
            "runs": len(runs),
            "seconds": math.fsum(run.seconds for run in runs),
            "cpu_seconds": math.fsum(run.cpu_seconds for run in runs),
        },
    }


def decide(entries: list[tuple[str, str, Mean]], design: Design) -> dict[str, Any]:
    """Answer whether information helps beyond its dose, for one family of comparisons.

    Every interval is widened for the number of comparisons (Bonferroni), so the probability of a false `yes` anywhere in the
    family is at most that of a single comparison. The answer for an information arm is `yes` if the answer against each
    decisive control is `yes`, and `no` if the answer against any of them is `no`. The answer for the family is `yes` if it is
    `yes` for any arm, and `no` if it is `no` for all arms.

    Args:
        entries: Information arm, decisive control, and the mean of their paired differences.
        design: For its margin.

    Returns:
        `answer` (None without comparisons), `level` of the intervals, `arms` with an answer each, `comparisons`. For an answer
        that is not resolved also :data:`NEEDS`. `seeds_needed` distinguish a true difference of 0 from the margin (80 % power).
        `questions_needed` is given where no number of seeds does. `seeds_if_seen` are enough if the observed difference is true.
    """
    level = 1 - ERROR_RATE / max(1, len(entries))
    rows: list[dict[str, Any]] = []
    for arm, control, mean in entries:
        # Identical runs have no variance from which an interval could be computed.
        low, high = mean.interval(level) if mean.error else (math.nan, math.nan)
        row = {"arm": arm, "control": control, "seeds": mean.seeds, "value": mean.value, "low": low, "high": high}
        rows.append(row | {"answer": answer(low, high, design.margin)} | _needs(mean, row, design.margin, level))
    arms: dict[str, Answer] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        arms[arm] = _arm_answer({row["answer"] for row in rows if row["arm"] == arm})
    found = set(arms.values())
    overall = "yes" if "yes" in found else "not resolved" if "not resolved" in found else "no" if found else None
    open_rows = [row for row in rows if overall == arms[row["arm"]] == row["answer"] == "not resolved"]
    needs = {name: max((row[name] for row in open_rows if row[name] is not None), default=None) for name in NEEDS}
    return {"answer": overall, "level": level, "arms": arms, "comparisons": rows} | needs


def _needs(mean: Mean, row: dict[str, Any], margin: float, level: float) -> dict[str, int | None]:
    """Return the sample sizes that would resolve a comparison; None for one that is resolved or has no variance."""
    needs: dict[str, int | None] = dict.fromkeys(NEEDS)
    if math.isnan(row["low"]) or answer(row["low"], row["high"], margin) != "not resolved":
        return needs
    seen = seeds_for(mean, max(mean.value, margin - mean.value), level)
    seeds = seeds_for(mean, margin, level)
    if seeds is None:
        needs["questions_needed"] = questions_for(mean, margin, level)
    elif seeds <= mean.seeds:
        seeds = seen  # reached already: the observed difference is between 0 and the margin and distinct from neither
    return needs | {"seeds_needed": seeds, "seeds_if_seen": seen}


def _arm_answer(found: set[Answer]) -> Answer:
    return "no" if "no" in found else "yes" if found == {"yes"} else "not resolved"


def _pooled(groups: list[Condition], design: Design, measure: Measure) -> dict[str, Any]:
    """Answer for the mean over conditions, with equal weights, on the seeds that all of them have."""
    comparisons: dict[tuple[str, str], list[tuple[Arm, Arm]]] = {}
    for condition in groups:
        for a, b, kind in pairs(condition, design):
            if kind in design.decisive:
                comparisons.setdefault((a.name, b.name), []).append((a, b))
    entries = []
    for (arm, control), each in comparisons.items():
        seeds = sorted(set.intersection(*(set(common(a, b)) for a, b in each)))
        entries.append((arm, control, two_way([paired(a, b, measure, seeds) for a, b in each]) if seeds else NOTHING))
    decided = decide(entries, design)
    for row, each in zip(decided["comparisons"], comparisons.values(), strict=True):
        row["studies"] = len(each)
    return decided


@dataclass(frozen=True)
class Comparison:
    """One arm minus another on one measure.

    Attributes:
        arm: Name.
        against: Name of the other.
        kind: `baseline`, or which control the other is.
        table: The differences on common seeds, ``(seeds, questions)``.
        mean: Of the table.
    """

    arm: str
    against: str
    kind: str
    table: Table
    mean: Mean


def compare(condition: Condition, design: Design, measure: Measure) -> list[Comparison]:
    """Return all paired differences of a condition on one measure."""
    found = []
    for a, b, kind in pairs(condition, design):
        table = paired(a, b, measure, common(a, b))
        found.append(Comparison(a.name, b.name, kind, table, two_way([table]) if len(table) else NOTHING))
    return found


def decide_condition(compared: list[Comparison], design: Design) -> dict[str, Any]:
    """Answer for one condition: :func:`decide` on its comparisons with decisive controls."""
    return decide([(row.arm, row.against, row.mean) for row in compared if row.kind in design.decisive], design)


def _condition(condition: Condition, design: Design) -> dict[str, Any]:
    compared = {measure: compare(condition, design, measure) for measure in MEASURES}
    rows: list[dict[str, Any]] = [
        {"arm": row.arm, "against": row.against, "kind": row.kind, "seeds": row.mean.seeds} for row in compared["final"]
    ]
    for measure, found in compared.items():
        p = [each.mean.p() for each in found]
        for row, each, own, corrected in zip(rows, found, p, holm(p), strict=True):
            row[measure] = _estimate(each.mean, each.table, design)
            row[measure] |= {"p": own, "p_holm": corrected, "deviation": each.mean.deviation}
    return {
        "study": condition.name,
        "steps": condition.first.steps,
        "evaluations": condition.steps,
        "questions": condition.questions,
        "samples": condition.first.samples,
        "seeds": condition.seeds,
        "multipliers": condition.multipliers,
        "arms": [_arm(arm, condition, design) for arm in condition.arms.values()],
        "comparisons": rows,
        "doses": [_doses(a, b) for a, b, kind in pairs(condition, design) if kind != "baseline"],
        "answers": {measure: decide_condition(found, design) for measure, found in compared.items()},
        "notes": _notes(condition, design),
    }


def _estimate(mean: Mean, table: Table, design: Design) -> dict[str, Any]:
    low, high = mean.interval(1 - ERROR_RATE)
    estimate: dict[str, Any] = {"value": mean.value, "low": low, "high": high}
    if design.draws:
        estimate["bootstrap"] = list(pigeonhole(table, design.draws, level=1 - ERROR_RATE))
    return estimate


def _arm(arm: Arm, condition: Condition, design: Design) -> dict[str, Any]:
    collapsed = [collapse_step(condition.steps, scores, design.collapse) for scores in arm.answers.mean(axis=2)]
    collapse_steps = [step for step in collapsed if step is not None]
    low, high = wilson_interval(len(collapse_steps), len(collapsed))
    return {
        "arm": arm.name,
        "seeds": len(arm.runs),
        "base": _estimate(two_way([arm.answers[:, 0]]), arm.answers[:, 0], design),
        **{measure: _estimate(two_way([arm.tables[measure]]), arm.tables[measure], design) for measure in MEASURES},
        "collapsed": {
            "count": len(collapse_steps),
            "share": len(collapse_steps) / len(collapsed),
            "low": low,
            "high": high,
            "step": float(np.median(collapse_steps)) if collapse_steps else math.nan,
            "steps": dict(zip(map(str, arm.seeds), collapsed, strict=True)),
        },
        "length": _over_seeds([measures.at_the_end(run, measures.LENGTH) for run in arm.runs]),
        "entropy": _over_seeds([measures.at_the_end(run, measures.ENTROPY) for run in arm.runs]),
        "dose": _over_seeds(list(arm.doses)),
    }


def _over_seeds(values: list[float]) -> dict[str, float]:
    """Return mean and interval of one number per seed. Seeds without the number do not count."""
    finite = np.array([value for value in values if math.isfinite(value)])
    mean = two_way([finite[:, None]]) if len(finite) else NOTHING
    low, high = mean.interval(1 - ERROR_RATE)
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
        if (seeds := common(a, b)) and not any(paired(a, b, measure, seeds).any() for measure in MEASURES)
    ]
    if design.baseline not in condition.arms:
        notes.append(
            f"There is no arm {design.baseline}, so there are no differences to a baseline. Choose another one with `--baseline` "
            f"({', '.join(condition.arms)})."
        )
    informed = [name for name in condition.arms if design.suffix(name) is not None]
    if not informed:
        notes.append(f"There is no information arm ({', '.join(design.information)}).")
    alone = [
        name
        for name in informed
        if any(design.control(control, name) not in condition.arms for control in design.decisive)
    ]
    if alone:
        decisive = " and ".join(design.decisive)
        notes.append(f"No {decisive} arm of the same dose, and therefore no answer, for: {', '.join(alone)}.")
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
        for seed, table in zip(arm.seeds, arm.answers, strict=True):
            bases.setdefault(seed, set()).add(table[0].tobytes())
    return sorted(seed for seed, found in bases.items() if len(found) > 1)
