"""The text of a report: tables, notes, the method, and the conclusion in one sentence."""

import math
from typing import Any

from pgpo_lightning.core.files import markdown_table
from pgpo_lightning.studies.analysis import DOSE_TOLERANCE
from pgpo_lightning.studies.measures import MEASURES

QUESTION = "Information helps beyond its dose"

METHOD = """\
- **final**: held-out score (mean over questions of the mean reward of their samples) at the last evaluation. **best**: at the
  run's best evaluation. It is chosen on the questions that it is scored on, so it is biased upwards, more with more evaluations.
  **area**: mean score over the steps (trapezoid area under the curve / span). Early steps count, so differences are smaller.
  **length** (tokens) and **entropy** (nats per token): of the rollouts, over the last tenth of the steps. **dose**: mean
  multiplier; 1 without a multiplier.
- **collapsed**: runs whose held-out score fell below {collapse:g} of the base model's at any evaluation, with the 95 % Wilson
  interval of their proportion. *at*: the first such step, median over these runs.
- **Intervals** are for new seeds and new questions: Student's t, variance clustered by seed and by question, degrees of freedom
  after Satterthwaite. **Differences** are paired by seed and question. `report.json` also has the percentile bootstrap over both.
  In simulated studies with 10 seeds, the intervals of differences shown here cover the true value in 94 to 99 % of the studies.
  Those of the bootstrap cover it in 98 %, but only in 87 to 91 % where single runs collapse. Intervals of an arm's score itself
  are less reliable where few runs collapse: with one collapse in ten runs, ten seeds may show none.
  `python -m benchmarks.study_simulation` measures the coverage for any study size.
- **Holm**: p-value corrected for all differences of one measure under one condition. The intervals beside it are not corrected.
- **The answer** is based on the {measure} score of the information arm minus that of {decisive} of the same dose. Its interval
  is widened for the number of such differences under a condition (Bonferroni). *yes*: the interval is above 0. *no*: the
  interval is below {margin:g}, the smallest difference of interest, so a gain of interest is excluded. Either answer is false
  in at most 2.5 % of studies. Otherwise *not resolved*. The seeds needed distinguish a true difference of 0 from {margin:g}
  (80 % power), with the variance observed.{pool}"""

POOL = """ All conditions together: the mean over conditions with equal weights, on the seeds that all of them have."""


def markdown(content: dict[str, Any], figures: dict[str, str]) -> str:
    """Return the report.

    Args:
        content: From :func:`pgpo_lightning.studies.analysis.analyse`.
        figures: Caption to file.
    """
    design, cost = content["design"], content["cost"]
    runs = f"{cost['runs']} runs, {cost['seconds'] / 3600:.2f} hours of wall time, {cost['cpu_seconds'] / 3600:.2f} of CPU time."
    parts = ["# Report", runs]
    parts += [_study(study, design) for study in content["studies"]]
    parts += [f"![{caption}]({file})" for caption, file in figures.items()]
    parts += ["## How it was computed", method(content)]
    if content["pooled"]:
        parts += ["## All conditions together", _answers(content["pooled"], design)]
    parts += ["## Answer", f"**{conclude(content)}**"]
    return "\n\n".join(parts) + "\n"


def method(content: dict[str, Any]) -> str:
    """Return the description of how the numbers were computed."""
    design = content["design"]
    return METHOD.format(
        **design | {"decisive": " and ".join(design["decisive"]), "pool": POOL if content["pooled"] else ""}
    )


def conclude(content: dict[str, Any]) -> str:
    """Return the conclusion in one sentence."""
    design, studies = content["design"], content["studies"]
    measure, margin = design["measure"], design["margin"]
    unmatched = _unmatched(studies, design)
    if not content["pooled"]:
        return f"{QUESTION}: {phrase(studies[0]['answers'][measure], margin, studies[0]['questions'])}{unmatched}."
    overall = phrase(content["pooled"][measure], margin, max(study["questions"] for study in studies))
    each = "; ".join(f"{study['study']}: {_brief(study['answers'][measure])}" for study in studies)
    return f"{QUESTION}, {len(studies)} conditions together: {overall}; {each}{unmatched}."


def phrase(decided: dict[str, Any], margin: float, questions: int) -> str:
    """Return an answer in words, with the differences it is based on.

    Args:
        decided: From :func:`pgpo_lightning.studies.analysis.decide`.
        margin: The smallest difference of interest.
        questions: Number of held-out questions.
    """
    answer, rows = decided["answer"], decided["comparisons"]
    if answer is None:
        return "not asked, because no information arm has its matched control"
    rows = [row for row in rows if row["answer"] == answer == decided["arms"][row["arm"]]]
    because = ", ".join(f"{row['arm']} minus {row['control']} {difference(row)}" for row in rows)
    if answer == "yes":
        small = f", but less than {margin:g}" if all(row["high"] < margin for row in rows) else ""
        return f"yes{small} ({because})"
    if answer == "no":
        return f"no, a gain of {margin:g} or more is excluded ({because})"
    seeds = min(row["seeds"] for row in rows)
    if any(math.isnan(row["low"]) for row in rows):
        if not seeds:
            reason = "arms without common seeds have"
        else:
            reason = "a single seed has" if seeds == 1 else "runs with the same answers have"
        return f"not resolved, because {reason} no interval ({because})"
    size = f"not resolved at this sample size ({seeds} seeds)"
    if needed := decided["questions_needed"]:
        return f"{size}, cannot be resolved by more seeds: at least {needed} questions are needed, not {questions} ({because})"
    needs = f"about {decided['seeds_needed']} seeds are needed"
    if decided["seeds_if_seen"] not in (None, decided["seeds_needed"]):
        needs += f", or {decided['seeds_if_seen']} if the observed difference is the true one"
    return f"{size}, {needs} ({because})"


def _brief(decided: dict[str, Any]) -> str:
    if decided["answer"] is None:
        return "not asked"
    if decided["questions_needed"]:
        return f"{decided['answer']} (more questions)"
    return decided["answer"] + (f" ({decided['seeds_needed']} seeds)" if decided["seeds_needed"] else "")


def _unmatched(studies: list[dict[str, Any]], design: dict[str, Any]) -> str:
    decisive = {(r["arm"], r["control"]) for s in studies for r in s["answers"][design["measure"]]["comparisons"]}
    found = [
        f"{row['control']} has {row['ratio']:.3f} of the dose of {row['arm']} in {study['study']}"
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
    conclusion = phrase(study["answers"][design["measure"]], design["margin"], study["questions"])
    return "\n\n".join([*parts, f"{QUESTION}: {conclusion}."])


def _arms(study: dict[str, Any]) -> str:
    rows = []
    for arm in study["arms"]:
        collapsed = arm["collapsed"]
        fraction = f"{collapsed['count']}/{arm['seeds']} [{collapsed['low']:.2f}, {collapsed['high']:.2f}]"
        step = "" if math.isnan(collapsed["step"]) else f"{collapsed['step']:g}"
        scores = [_level(arm[name]) for name in ("base", *MEASURES)]
        rest = [
            _level(arm["length"], 1),
            _level(arm["entropy"]),
            *([_level(arm["dose"])] if study["multipliers"] else []),
        ]
        rows.append([arm["arm"], str(arm["seeds"]), *scores, fraction, step, *rest])
    header = [
        "arm",
        "seeds",
        "base",
        "final",
        "best (biased upwards)",
        "area",
        "collapsed",
        "at",
        "length",
        "entropy",
        *(["dose"] if study["multipliers"] else []),
    ]
    return markdown_table(header, rows)


def _comparisons(study: dict[str, Any]) -> str:
    header = ["difference", "seeds", "final", "p", "Holm", "best", "p", "Holm", "area", "p", "Holm"]
    rows = []
    for row in study["comparisons"]:
        results = [row[name] for name in MEASURES]
        cells = [cell for each in results for cell in (difference(each), _p(each["p"]), _p(each["p_holm"]))]
        rows.append([f"{row['arm']} − {row['against']}", str(row["seeds"]), *cells])
    return markdown_table(header, rows)


def _doses(study: dict[str, Any]) -> str:
    rows = []
    for row in study["doses"]:
        flag = "matched" if row["matched"] else f"**off by more than {100 * DOSE_TOLERANCE:g} %**"
        doses = [f"{row[name]:.4f}" for name in ("dose", "control_dose", "ratio", "farthest")]
        rows.append([row["arm"], row["control"], *doses, flag])
    return markdown_table(
        ["arm", "control", "dose", "control's dose", "ratio", "ratio of the most different seed", ""], rows
    )


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
        "information minus control",
        "seeds",
        interval,
        "answer",
        "seeds needed",
        "if the observed difference is true",
    ]
    return markdown_table(header, rows)


def difference(row: dict[str, Any]) -> str:
    """Return a difference with its sign, and its interval if there is one.

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
