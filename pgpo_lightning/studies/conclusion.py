"""The conclusion of a report in words. It follows from the numbers and from nothing else."""

import math
from typing import Any

from pgpo_lightning.studies.sample_size import FEWEST

QUESTION = "Information helps beyond its dose"

INTERACTION_LEVEL = 0.05
"""Below this corrected p-value a report says that the difference depends on the condition."""


def conclude(content: dict[str, Any]) -> str:
    """Return the conclusion in one sentence.

    Args:
        content: From :func:`pgpo_lightning.studies.analysis.analyse`.
    """
    design, studies, together = content["design"], content["studies"], content["pooled"]
    unmatched = _unmatched(studies)
    if not together:
        return f"{QUESTION}: {phrase(studies[0]['answers'], design, studies[0]['questions'])}{unmatched}."
    each = "; ".join(f"{study['study']}: {_brief(study['answers'])}" for study in studies)
    questions = max(study["questions"] for study in studies)
    if together["studies"] and together["answer"] is None:
        overall = (
            f"not asked of {_names(together['studies'])} together, because they share no information arm with a control"
        )
    elif together["studies"]:
        overall = f"{_names(together['studies'])} together: {phrase(together, design, questions)}"
    else:
        overall = f"not asked of conditions together, because {nothing_pooled(content)}"
    return f"{QUESTION}, {overall}; {each}{depends(content['interaction'])}{unmatched}."


def nothing_pooled(content: dict[str, Any]) -> str:
    """Return why no conditions are pooled."""
    learns = [row["study"] for row in content["learning"] if row["learns"]]
    if content["design"]["pool"] == "learning" and not learns:
        return f"{content['design']['baseline']} learns under none of them"
    return "their held-out questions differ"


def depends(interaction: list[dict[str, Any]]) -> str:
    """Return a warning if the difference depends on the condition, else an empty text."""
    found = [row for row in interaction if row["p_holm"] < INTERACTION_LEVEL]
    if not found:
        return ""
    row = min(found, key=lambda row: row["p_holm"])
    p = number(row["p_holm"]).removeprefix("< ")
    sign = "<" if row["p_holm"] < 0.001 else "="
    return (
        f" (the difference depends on the condition: {row['arm']} in {row['first']} minus {row['second']} {difference(row)}, "
        f"p {sign} {p})"
    )


def phrase(decided: dict[str, Any], design: dict[str, Any], questions: int) -> str:
    """Return an answer in words, with the differences it is based on.

    Args:
        decided: From :func:`pgpo_lightning.studies.decisions.decide`.
        design: Of the report.
        questions: Number of held-out questions.
    """
    answer, margin = decided["answer"], design["margin"]
    if answer is None:
        return "not asked, because no information arm has a matched control"
    arms = [arm for arm in decided["arms"] if arm["answer"] == answer]
    because = "; ".join(reason(arm) for arm in arms) + ("" if answer == "not resolved" else _thin(arms))
    if answer == "yes":
        small = all(row["high"] < margin for arm in arms for row in arm["averaged"])
        return f"yes{f', but less than {margin:g}' if small else ''} ({because})"
    if answer == "equivalent":
        return f"equivalent within {margin:g} ({because})"
    if answer == "no":
        return f"no, a gain of {margin:g} or more on {_excluded(arms)} is excluded ({because})"
    return f"{unresolved(arms[0], margin, questions)} ({because})"


def reason(arm: dict[str, Any]) -> str:
    """Return the differences that an answer is based on: to the mean of the exchangeable controls."""
    values = ", ".join(f"{row['measure']} {difference(row)}" for row in arm["averaged"])
    mean = f"the mean of {', '.join(arm['averages'])}" if len(arm["averages"]) > 1 else arm["averages"][0]
    return f"{arm['arm']} minus {mean}: {values}"


def _thin(arms: list[dict[str, Any]]) -> str:
    """Return what an answer has to be read with: too few seeds to know their variance, or controls that were not run."""
    seeds = min(arm["seeds"] for arm in arms)
    missing = list(dict.fromkeys(name for arm in arms for name in arm["missing"]))
    few = f"; {seeds} seeds are too few to know their variance" if seeds < FEWEST else ""
    return few + (f"; without {', '.join(missing)}" if missing else "")


def _excluded(arms: list[dict[str, Any]]) -> str:
    """Return the measures on which a gain of interest is excluded."""
    found = [
        row["measure"] for arm in arms for row in arm["averaged"] if row["p_no"] < arm["level"] / len(arm["averaged"])
    ]
    return " and ".join(dict.fromkeys(found))


def unresolved(arm: dict[str, Any], margin: float, questions: int) -> str:
    """Return why the answer for an arm is not resolved, and what would resolve it."""
    seeds = arm["seeds"]
    if not seeds:
        return "not resolved, because arms have no common seeds"
    if not arm["level"]:
        return f"not resolved, because {seeds} seeds are between two looks"
    if any(math.isnan(row["p"]) for row in arm["averaged"]):
        return f"not resolved, because {'a single seed has' if seeds == 1 else 'runs with the same answers have'} no interval"
    if arm["missing"] and arm["p"] < arm["level"]:
        return f"not resolved, because there is no {', '.join(arm['missing'])}"
    size = f"not resolved at this sample size ({seeds} seeds)"
    if needed := arm["questions_needed"]:
        return f"{size}, cannot be resolved by more seeds: at least {needed} questions are needed, not {questions}"
    if not arm["seeds_needed"]:
        return size
    text = f"{size}, about {_range(arm['seeds_needed'])} seeds are needed to distinguish 0 from {margin:g}"
    if arm["seeds_if_seen"] not in (None, arm["seeds_needed"]):
        text += f", or {_range(arm['seeds_if_seen'])} if the observed difference is the true one"
    return text


def _range(limits: tuple[int, int | None]) -> str:
    low, high = limits
    return f"{low} or more" if high is None else f"{low} to {high}" if high > low else str(low)


def needs_text(arm: dict[str, Any]) -> str:
    """Return the sample size that an answer needs, for a table; empty where none is known."""
    if arm["questions_needed"]:
        return "more questions"
    return f"{_range(arm['seeds_needed'])} seeds" if arm["seeds_needed"] else ""


def _brief(decided: dict[str, Any]) -> str:
    if decided["answer"] is None:
        return "not asked"
    needed = {needs_text(arm) for arm in decided["arms"] if arm["answer"] == decided["answer"]} - {""}
    return decided["answer"] + (f" ({', '.join(sorted(needed))})" if needed else "")


def _unmatched(studies: list[dict[str, Any]]) -> str:
    decisive = {
        (study["study"], arm["arm"], row["control"])
        for study in studies
        for arm in study["answers"]["arms"]
        for row in arm["comparisons"]
    }
    found = [
        f"{row['control']} has {row['ratio']:.3f} of the dose of {row['arm']} in {study['study']}"
        for study in studies
        for row in study["doses"]
        if not row["matched"] and (study["study"], row["arm"], row["control"]) in decisive
    ]
    return f" (but the doses do not match: {', '.join(found)})" if found else ""


def _names(studies: list[str]) -> str:
    return ", ".join(studies)


def difference(row: dict[str, Any]) -> str:
    """Return a difference with its sign, and its interval if there is one.

    Example:
        >>> difference({"value": 0.0312, "low": 0.004, "high": 0.0584})
        '+0.031 [+0.004, +0.058]'
    """
    return _with_interval(row, "+.3f")


def level(row: dict[str, Any], digits: int = 3) -> str:
    """Return a score or another quantity with its interval, if there is one."""
    return _with_interval(row, f".{digits}f")


def _with_interval(row: dict[str, Any], form: str) -> str:
    if math.isnan(row["value"]):
        return "–"
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:{form}}, {row['high']:{form}}]"
    return f"{row['value']:{form}}{interval}"


def number(p: float) -> str:
    """Return a p-value.

    Example:
        >>> number(0.0312), number(0.0001)
        ('0.031', '< 0.001')
    """
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
