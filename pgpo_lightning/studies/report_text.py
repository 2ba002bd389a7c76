"""The words of a report: tables, notes, how it was computed, and the one sentence that it ends in."""

import math
from typing import Any

from pgpo_lightning.studies.analysis import DOSE_TOLERANCE
from pgpo_lightning.studies.measures import MEASURES

QUESTION = "Information helps beyond its dose"

METHOD = """\
- **final**: held-out score (mean over questions of the mean reward of their samples) at the last evaluation. **best**: at the
  run's best evaluation; chosen on the questions that it is scored on, so it is biased upwards, the more so the more evaluations
  there are. **area**: mean score over the steps (trapezoid area under the curve / span); early steps count, so differences are
  smaller. **length** (tokens) and **entropy** (nats per token): of the rollouts, over the last tenth of the steps. **dose**: mean
  multiplier; 1 without one.
- **collapsed**: runs whose held-out score fell below {collapse:g} of the base model's at any evaluation, with the 95 % interval
  of the share (Wilson); *at*: the median over them of the first such step.
- **Intervals** are for new seeds and new questions: Student's t with the variance clustered by seed and by question, and
  degrees of freedom after Satterthwaite. **Differences** are paired by seed and question. The percentile bootstrap over both is
  in `report.json`. On simulated differences of 10 seeds, the intervals shown cover the truth in 94 to 99 % of the studies; those
  of the bootstrap in 98 %, but in 87 to 91 % where single runs collapse. The level of an arm (no difference) is less sure where
  few runs collapse: ten seeds may show none of a collapse in ten. `python -m pgpo_lightning.studies.simulation` measures it
  for any size.
- **Holm**: p corrected for all differences of one measure in one study. Intervals beside it are not corrected.
- **The answer** rests on the {measure} score, and on information arm minus {decisive} of the same dose. Its interval is widened
  for the number of such differences in a study (Bonferroni). *yes*: it lies above 0. *no*: it lies below {margin:g}, the smallest
  difference of interest, so a gain that matters is excluded. Either is false in at most 2.5 % of studies. Otherwise
  *not resolved*; the seeds it would need tell a true difference of 0 from one of {margin:g} with a power of 80 %, with the spread
  that was seen.{pool}"""

POOL = """ The studies together: their mean, each counting alike, on the seeds that all have."""


def markdown(content: dict[str, Any], pictures: dict[str, str]) -> str:
    """Return the report.

    Args:
        content: From :func:`pgpo_lightning.studies.analysis.analyse`.
        pictures: Caption to file.
    """
    design, cost = content["design"], content["cost"]
    runs = f"{cost['runs']} runs, {cost['seconds'] / 3600:.2f} hours of wall time, {cost['cpu_seconds'] / 3600:.2f} of CPU time."
    parts = ["# Report", runs]
    parts += [_study(study, design) for study in content["studies"]]
    parts += [f"![{caption}]({file})" for caption, file in pictures.items()]
    parts += ["## How it was computed", method(content)]
    if content["pooled"]:
        parts += ["## All studies together", _answers(content["pooled"], design)]
    parts += ["## Answer", f"**{conclude(content)}**"]
    return "\n\n".join(parts) + "\n"


def method(content: dict[str, Any]) -> str:
    """Return how the numbers were computed."""
    design = content["design"]
    return METHOD.format(
        **design | {"decisive": " and ".join(design["decisive"]), "pool": POOL if content["pooled"] else ""}
    )


def conclude(content: dict[str, Any]) -> str:
    """Return the answer in one sentence."""
    design, studies = content["design"], content["studies"]
    measure, margin = design["measure"], design["margin"]
    unmatched = _unmatched(studies, design)
    if not content["pooled"]:
        return f"{QUESTION}: {phrase(studies[0]['answers'][measure], margin, studies[0]['questions'])}{unmatched}."
    told = phrase(content["pooled"][measure], margin, max(study["questions"] for study in studies))
    each = "; ".join(f"{study['study']}: {_brief(study['answers'][measure])}" for study in studies)
    return f"{QUESTION}, {len(studies)} studies together: {told}; {each}{unmatched}."


def phrase(decided: dict[str, Any], margin: float, questions: int) -> str:
    """Return an answer in words, with the differences that it follows from.

    Args:
        decided: From :func:`pgpo_lightning.studies.analysis.decide`.
        margin: The smallest difference of interest.
        questions: Number of held-out questions.
    """
    answer, rows = decided["answer"], decided["comparisons"]
    if answer is None:
        return "not asked, for no information arm has its matched control beside it"
    rows = [row for row in rows if row["answer"] == answer == decided["arms"][row["arm"]]]
    because = ", ".join(f"{row['arm']} over {row['control']} {difference(row)}" for row in rows)
    if answer == "yes":
        small = f", but less than {margin:g}" if all(row["high"] < margin for row in rows) else ""
        return f"yes{small} ({because})"
    if answer == "no":
        return f"no, a gain of {margin:g} or more is excluded ({because})"
    seeds = min(row["seeds"] for row in rows)
    if any(math.isnan(row["low"]) for row in rows):
        why = (
            "without common seeds there is"
            if not seeds
            else "a single seed has"
            if seeds == 1
            else "runs with the same answers have"
        )
        return f"not resolved, for {why} no interval ({because})"
    told = f"not resolved at this sample size ({seeds} seeds), which "
    if decided["questions_needed"]:
        needs = f"no number of seeds would mend: it would need {decided['questions_needed']} questions or more, not {questions}"
        return f"{told}{needs} ({because})"
    needs = f"would need {decided['seeds_needed']} seeds"
    if decided["seeds_if_seen"] not in (None, decided["seeds_needed"]):
        needs += f", or {decided['seeds_if_seen']} if the difference seen is the true one"
    return f"{told}{needs} ({because})"


def _brief(decided: dict[str, Any]) -> str:
    if decided["answer"] is None:
        return "not asked"
    if decided["questions_needed"]:
        return f"{decided['answer']} (more questions)"
    return decided["answer"] + (f" ({decided['seeds_needed']} seeds)" if decided["seeds_needed"] else "")


def _unmatched(studies: list[dict[str, Any]], design: dict[str, Any]) -> str:
    decisive = {(r["arm"], r["control"]) for s in studies for r in s["answers"][design["measure"]]["comparisons"]}
    found = [
        f"{row['control']} has {row['ratio']:.3f} of {row['arm']}'s in {study['study']}"
        for study in studies
        for row in study["doses"]
        if not row["matched"] and (row["arm"], row["control"]) in decisive
    ]
    return f" (but the doses do not match: {', '.join(found)})" if found else ""


def _study(study: dict[str, Any], design: dict[str, Any]) -> str:
    evaluations = ", ".join(map(str, study["evaluations"]))
    size = (
        f"{study['steps']} steps, {study['questions']} held-out questions with {study['samples']} samples each, evaluated at "
        f"step {evaluations}; {len(study['seeds'])} seeds ({', '.join(map(str, study['seeds']))})."
    )
    notes = ["\n".join(f"- {note}" for note in study["notes"])] if study["notes"] else []
    parts = [f"## {study['study']}", size, *notes, _arms(study)]
    if study["comparisons"]:
        parts.append(_comparisons(study))
    if study["doses"]:
        parts.append(_doses(study))
    if study["answers"][design["measure"]]["answer"] is not None:
        parts.append(_answers(study["answers"], design))
    told = phrase(study["answers"][design["measure"]], design["margin"], study["questions"])
    return "\n\n".join([*parts, f"{QUESTION}: {told}."])


def _arms(study: dict[str, Any]) -> str:
    rows = []
    for arm in study["arms"]:
        gone = arm["collapsed"]
        share = f"{gone['count']}/{arm['seeds']} [{gone['low']:.2f}, {gone['high']:.2f}]"
        at = "" if math.isnan(gone["step"]) else f"{gone['step']:g}"
        scores = [_level(arm[name]) for name in ("base", *MEASURES)]
        rest = [
            _level(arm["length"], 1),
            _level(arm["entropy"]),
            *([_level(arm["dose"])] if study["multipliers"] else []),
        ]
        rows.append([arm["arm"], str(arm["seeds"]), *scores, share, at, *rest])
    header = [
        "arm",
        "seeds",
        "base",
        "final",
        "best (too high)",
        "area",
        "collapsed",
        "at",
        "length",
        "entropy",
        *(["dose"] if study["multipliers"] else []),
    ]
    return table(header, rows)


def _comparisons(study: dict[str, Any]) -> str:
    header = ["difference", "seeds", "final", "p", "Holm", "best", "p", "Holm", "area", "p", "Holm"]
    rows = []
    for row in study["comparisons"]:
        told = [row[name] for name in MEASURES]
        cells = [cell for each in told for cell in (difference(each), _p(each["p"]), _p(each["p_holm"]))]
        rows.append([f"{row['arm']} − {row['against']}", str(row["seeds"]), *cells])
    return table(header, rows)


def _doses(study: dict[str, Any]) -> str:
    rows = []
    for row in study["doses"]:
        flag = "matched" if row["matched"] else f"**off by more than {100 * DOSE_TOLERANCE:g} %**"
        doses = [f"{row[name]:.4f}" for name in ("dose", "control_dose", "ratio", "farthest")]
        rows.append([row["arm"], row["control"], *doses, flag])
    return table(["arm", "control", "dose", "control's dose", "ratio", "ratio of the farthest seed", ""], rows)


def _answers(answers: dict[str, Any], design: dict[str, Any]) -> str:
    rows = []
    for name in MEASURES:
        for row in answers[name]["comparisons"]:
            decides = f"**{name}**" if name == design["measure"] else name
            needs = row["seeds_needed"] or ("more questions" if row["questions_needed"] else "")
            pair = f"{row['arm']} − {row['control']}"
            seen = str(row["seeds_if_seen"] or "")
            rows.append([decides, pair, str(row["seeds"]), difference(row), row["answer"], str(needs), seen])
    interval = f"[{100 * answers[design['measure']]['level']:.4g} % interval]"
    header = [
        "measure",
        "beyond its dose",
        "seeds",
        interval,
        "answer",
        "seeds needed",
        "if the difference seen is true",
    ]
    return table(header, rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table.

    Example:
        >>> print(table(["arm", "score"], [["sdpo", "0.5"]]))
        | arm | score |
        |---|---|
        | sdpo | 0.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)


def difference(row: dict[str, Any]) -> str:
    """Return a difference with its sign and its interval, if it has one.

    Example:
        >>> difference({"value": 0.0312, "low": 0.004, "high": 0.0584})
        '+0.031 [+0.004, +0.058]'
    """
    return _with_interval(row, "+.3f")


def _level(row: dict[str, Any], digits: int = 3) -> str:
    return _with_interval(row, f".{digits}f")


def _with_interval(row: dict[str, Any], form: str) -> str:
    if math.isnan(row["value"]):
        return "–"
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:{form}}, {row['high']:{form}}]"
    return f"{row['value']:{form}}{interval}"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
