"""From the records of many runs to the numbers of a report: measures, paired differences, doses and answers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.comparisons import Arm, Condition, Design, common, paired, pairs, studies
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
"""How far a control's mean dose may be from that of its information arm, as a share."""

FEW_SEEDS = 5
"""Below this a reader is warned."""

ERROR_RATE = 0.05
"""Of an interval, and of all the answers of one family together."""

NEEDS = ("seeds_needed", "seeds_if_seen", "questions_needed")
"""What would resolve an answer; see :func:`decide`."""

NOTHING = Mean(math.nan, math.nan, math.nan, math.nan, 0, 0)
"""The difference of arms without a common seed."""


def analyse(runs: list[RunRecord], design: Design) -> dict[str, Any]:
    """Turn runs into the content of a report.

    Args:
        runs: Of one or more studies.
        design: What is asked of them.

    Returns:
        As `report.json`: `studies`, each with `arms`, `comparisons`, `doses`, `answers` and `multipliers` (whether any run had
        one); `pooled`, the answers over all studies, or None for a single one. NaN stands where there is no number.

    Raises:
        ValueError: As :func:`studies`.
    """
    groups = studies(runs, design)
    return {
        "design": design.__dict__
        | {name: list(getattr(design, name)) for name in ("information", "controls", "decisive")},
        "studies": [_study(study, design) for study in groups],
        "pooled": {m: _pooled(groups, design, m) for m in MEASURES} if len(groups) > 1 else None,
        "cost": {
            "runs": len(runs),
            "seconds": math.fsum(run.seconds for run in runs),
            "cpu_seconds": math.fsum(run.cpu_seconds for run in runs),
        },
    }


def decide(entries: list[tuple[str, str, Mean]], design: Design) -> dict[str, Any]:
    """Answer whether information helps beyond its dose, for one family of comparisons.

    Every interval is widened for the number of comparisons (Bonferroni), so a false `yes` anywhere in the family has at most
    the rate of a single one. An information arm has a `yes` if it has it against each decisive control, and a `no` if it
    has it against any. The family has a `yes` if any arm has, and a `no` if all have.

    Args:
        entries: Information arm, decisive control, and the mean of their paired differences.
        design: For its margin.

    Returns:
        `answer` (None if nothing was asked), `level` of the intervals, `arms` with an answer each, `comparisons`; for an
        answer that is not resolved :data:`NEEDS`: `seeds_needed` tell a true difference of 0 from one of the margin with a power
        of 80 %, or `questions_needed` where no number of seeds does; `seeds_if_seen` if the difference seen is the true one.
    """
    level = 1 - ERROR_RATE / max(1, len(entries))
    rows: list[dict[str, Any]] = []
    for arm, control, mean in entries:
        # Runs that agree to the letter show no spread to reckon with.
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
    """Return what an unresolved comparison would need; all None for one that is resolved, or has no spread to plan with."""
    needs: dict[str, int | None] = dict.fromkeys(NEEDS)
    if math.isnan(row["low"]) or answer(row["low"], row["high"], margin) != "not resolved":
        return needs
    seen = seeds_for(mean, max(mean.value, margin - mean.value), level)
    seeds = seeds_for(mean, margin, level)
    if seeds is None:
        needs["questions_needed"] = questions_for(mean, margin, level)
    elif seeds <= mean.seeds:
        seeds = seen  # there already: what was seen lies between 0 and the margin, and is told from neither
    return needs | {"seeds_needed": seeds, "seeds_if_seen": seen}


def _arm_answer(found: set[Answer]) -> Answer:
    return "no" if "no" in found else "yes" if found == {"yes"} else "not resolved"


def _pooled(groups: list[Condition], design: Design, measure: Measure) -> dict[str, Any]:
    """Answer for the mean over studies: each counts alike, on the seeds that are in all of them."""
    asked: dict[tuple[str, str], list[tuple[Arm, Arm]]] = {}
    for study in groups:
        for a, b, kind in pairs(study, design):
            if kind in design.decisive:
                asked.setdefault((a.name, b.name), []).append((a, b))
    entries = []
    for (arm, control), each in asked.items():
        seeds = sorted(set.intersection(*(set(common(a, b)) for a, b in each)))
        entries.append((arm, control, two_way([paired(a, b, measure, seeds) for a, b in each]) if seeds else NOTHING))
    decided = decide(entries, design)
    for row, each in zip(decided["comparisons"], asked.values(), strict=True):
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


def compare(study: Condition, design: Design, measure: Measure) -> list[Comparison]:
    """Return all paired differences of a study on one measure."""
    found = []
    for a, b, kind in pairs(study, design):
        table = paired(a, b, measure, common(a, b))
        found.append(Comparison(a.name, b.name, kind, table, two_way([table]) if len(table) else NOTHING))
    return found


def decide_study(compared: list[Comparison], design: Design) -> dict[str, Any]:
    """Answer for one study: :func:`decide` for its comparisons with decisive controls."""
    return decide([(row.arm, row.against, row.mean) for row in compared if row.kind in design.decisive], design)


def _study(study: Condition, design: Design) -> dict[str, Any]:
    compared = {measure: compare(study, design, measure) for measure in MEASURES}
    rows: list[dict[str, Any]] = [
        {"arm": row.arm, "against": row.against, "kind": row.kind, "seeds": row.mean.seeds} for row in compared["final"]
    ]
    for measure, found in compared.items():
        p = [each.mean.p() for each in found]
        for row, each, own, corrected in zip(rows, found, p, holm(p), strict=True):
            row[measure] = _told(each.mean, each.table, design)
            row[measure] |= {"p": own, "p_holm": corrected, "deviation": each.mean.deviation}
    return {
        "study": study.name,
        "steps": study.first.steps,
        "evaluations": study.steps,
        "questions": study.questions,
        "samples": study.first.samples,
        "seeds": study.seeds,
        "multipliers": study.multipliers,
        "arms": [_arm(arm, study, design) for arm in study.arms.values()],
        "comparisons": rows,
        "doses": [_doses(a, b) for a, b, kind in pairs(study, design) if kind != "baseline"],
        "answers": {measure: decide_study(found, design) for measure, found in compared.items()},
        "notes": _notes(study, design),
    }


def _told(mean: Mean, table: Table, design: Design) -> dict[str, Any]:
    low, high = mean.interval(1 - ERROR_RATE)
    told: dict[str, Any] = {"value": mean.value, "low": low, "high": high}
    if design.draws:
        told["bootstrap"] = list(pigeonhole(table, design.draws, level=1 - ERROR_RATE))
    return told


def _arm(arm: Arm, study: Condition, design: Design) -> dict[str, Any]:
    collapsed = [measures.collapse_step(study.steps, scores, design.collapse) for scores in arm.answers.mean(axis=2)]
    at = [step for step in collapsed if step is not None]
    low, high = wilson_interval(len(at), len(collapsed))
    return {
        "arm": arm.name,
        "seeds": len(arm.runs),
        "base": _told(two_way([arm.answers[:, 0]]), arm.answers[:, 0], design),
        **{measure: _told(two_way([arm.tables[measure]]), arm.tables[measure], design) for measure in MEASURES},
        "collapsed": {
            "count": len(at),
            "share": len(at) / len(collapsed),
            "low": low,
            "high": high,
            "step": float(np.median(at)) if at else math.nan,
            "steps": dict(zip(map(str, arm.seeds), collapsed, strict=True)),
        },
        "length": _over_seeds([measures.at_the_end(run, measures.LENGTH) for run in arm.runs]),
        "entropy": _over_seeds([measures.at_the_end(run, measures.ENTROPY) for run in arm.runs]),
        "dose": _over_seeds(list(arm.doses)),
    }


def _over_seeds(values: list[float]) -> dict[str, float]:
    """Return mean and interval of one number per seed; seeds without it do not count."""
    there = np.array([value for value in values if math.isfinite(value)])
    mean = two_way([there[:, None]]) if len(there) else NOTHING
    low, high = mean.interval(1 - ERROR_RATE)
    return {"value": mean.value, "low": low, "high": high}


def _doses(arm: Arm, control: Arm) -> dict[str, Any]:
    """Compare the mean multipliers of an information arm and a control, on common seeds."""
    seeds = common(arm, control)
    own, other = arm.doses[arm.rows(seeds)], control.doses[control.rows(seeds)]
    told = {"arm": arm.name, "control": control.name, "seeds": len(seeds)}
    if not seeds:
        return told | {
            "dose": math.nan,
            "control_dose": math.nan,
            "ratio": math.nan,
            "farthest": math.nan,
            "matched": False,
        }
    each = other / own
    ratio = float(other.mean() / own.mean())
    return told | {
        "dose": float(own.mean()),
        "control_dose": float(other.mean()),
        "ratio": ratio,
        "farthest": float(each[np.abs(each - 1).argmax()]),
        "matched": abs(ratio - 1) <= DOSE_TOLERANCE,
    }


def _notes(study: Condition, design: Design) -> list[str]:
    """Say what a reader has to know about the runs that are there, and about those that are not."""
    notes = [
        f"{arm.name} has no seed {', '.join(missing)}: its differences are on the common seeds."
        for arm in study.arms.values()
        if (missing := [str(seed) for seed in study.seeds if seed not in arm.seeds])
    ]
    if len(study.seeds) == 1:
        notes.append("A single seed: nothing is known of the spread between seeds, so there are no intervals.")
    elif len(study.seeds) < FEW_SEEDS:
        notes.append(
            f"Fewer than {FEW_SEEDS} seeds: their spread is hardly known, and an answer leans on the assumptions."
        )
    notes += [
        f"{a.name} and {b.name} gave the same answers in every run: nothing is known of how far they could differ."
        for a, b, _ in pairs(study, design)
        if (seeds := common(a, b)) and not any(paired(a, b, measure, seeds).any() for measure in MEASURES)
    ]
    if design.baseline not in study.arms:
        notes.append(
            f"There is no arm {design.baseline}, so no differences to a baseline: `--baseline` names another one "
            f"({', '.join(study.arms)})."
        )
    asked = [name for name in study.arms if design.suffix(name) is not None]
    if not asked:
        notes.append(f"There is no information arm ({', '.join(design.information)}).")
    alone = [
        name for name in asked if any(design.control(control, name) not in study.arms for control in design.decisive)
    ]
    if alone:
        decisive = " and ".join(design.decisive)
        notes.append(f"Without {decisive} of the same dose beside it, so without an answer: {', '.join(alone)}.")
    if study.steps[0] != 0:
        notes.append(f"There is no evaluation at step 0: that at step {study.steps[0]} stands for the base model.")
    elif different := _different_bases(study):
        notes.append(
            f"Before the first step the arms answer differently with the same seed ({', '.join(map(str, different))}): other "
            "held-out questions, another model, or another machine. Pairs then share less."
        )
    runs = [run for arm in study.arms.values() for run in arm.runs]
    if 0 < (unknown := sum("validation" not in run.data for run in runs)) < len(runs):
        notes.append(
            f"{unknown} of {len(runs)} runs were recorded without what identifies their held-out questions: for these only "
            "the number of questions was compared."
        )
    if study.steps[-1] < study.first.steps:
        notes.append(
            f"No run was evaluated after its last step, {study.first.steps}: `final` is the score after step {study.steps[-1]}."
        )
    return notes


def _different_bases(study: Condition) -> list[int]:
    """Return the seeds whose runs do not start with the same answers; evaluation is seeded, so they should."""
    bases: dict[int, set[bytes]] = {}
    for arm in study.arms.values():
        for seed, table in zip(arm.seeds, arm.answers, strict=True):
            bases.setdefault(seed, set()).add(table[0].tobytes())
    return sorted(seed for seed, found in bases.items() if len(found) > 1)
