"""The text of a report: sections, the method, and the conclusion."""

from typing import Any

from pgpo_lightning.studies import report_tables as tables
from pgpo_lightning.studies.conclusion import QUESTION, conclude, depends, nothing_pooled, phrase
from pgpo_lightning.studies.coverage import coverage_text
from pgpo_lightning.studies.decisions import ONE_SIDED

METHOD = """\
- **final**: held-out score (mean over questions of the {score}) at the last evaluation. **best**: at the run's best evaluation.
  It is chosen on the questions that it is scored on, so it is biased upwards, more with more evaluations. **area**: mean score
  over the steps (trapezoid area under the curve / span). Early steps count, so differences are smaller. **length** (tokens) and
  **entropy** (nats per token): of the rollouts, over the last tenth of the steps. **dose**: mean multiplier; 1 without one.
- **collapsed**: runs whose held-out avg@k fell below {collapse:g} of the base model's at any evaluation, with the exact 95 %
  interval of their share (Clopper and Pearson). *at step*: the first such step, median over these runs. Shares are compared by
  exact tests: McNemar's, paired by seed, or Fisher's where arms have different seeds. The mean of the runs that live compares
  selected runs: an arm that loses its weak runs looks better in it.
- **Intervals** are for new seeds and new questions: Student's t, variance clustered by seed and by question, degrees of freedom
  after Satterthwaite. **Differences** are paired by seed and question. `report.json` also has the percentile bootstrap over both.
{coverage}
- **Holm**: p-value corrected for all differences of one measure under one condition. The intervals beside it are not corrected.
- **The answer** for an information arm compares it with {decisive} of the same dose, on {measures}. *yes*: it exceeds every one
  of these controls on every one of these measures, and none is missing; each comparison has the full level (intersection-union
  test). *equivalent*: the difference to the mean of the exchangeable controls is within {margin:g}, the smallest difference of
  interest, on every measure (two one-sided tests). *no*: that difference is below {margin:g} on some measure, so a gain of
  interest over all controls is excluded; the level is divided by the number of measures. Otherwise *not resolved*. The one-sided
  level is {level:g}, divided by the number of arms and conditions that are asked together.{looks}
- **Sample sizes** are for the difference to the mean of the exchangeable controls (80 % power, 0 against {margin:g}): the 5 % to
  95 % range that the variance between so few seeds leaves open. There is none with fewer than five seeds.{pool}"""

LOOKS = """ The study is looked at with {looks} seeds; at a look the level is that of its {spending}
  spending function, and between looks there is no answer."""

POOL = """
- **All conditions together**: the interaction is the difference under one condition minus that under another; its p-values are
  corrected for the pairs of conditions of an arm (Holm). Pooled are {rule}: their mean with equal weights, on the seeds that all
  of them have. This answer is the primary one; the answers under single conditions are a family of their own.
- **Tuned**: each arm under its own best condition. One half of the seeds chooses it by the {first} score, the other half is
  scored in it, and the reverse, so no seed is scored where it helped to choose. The questions are the same in both halves."""

RULES = {
    "learning": "the conditions in which {baseline} learns (its final minus its base score has a 95 % interval above 0)",
    "all": "all conditions",
}

SCORES = {"avg": "mean reward of their samples", "solution-probability": "exact probability of the worked solution"}


def markdown(content: dict[str, Any], figures: dict[str, str]) -> str:
    """Return the report.

    Args:
        content: From :func:`pgpo_lightning.studies.analysis.analyse`.
        figures: Caption to file.
    """
    cost = content["cost"]
    runs = f"{cost['runs']} runs, {cost['seconds'] / 3600:.2f} hours of wall time, {cost['cpu_seconds'] / 3600:.2f} of CPU time."
    parts = ["# Report", runs]
    parts += [_registration(one) for one in content.get("registrations", [])]
    if content["pooled"]:
        parts.append(_together(content))
    parts += [_study(study, content["design"]) for study in content["studies"]]
    parts += [f"![{caption}]({file})" for caption, file in figures.items()]
    parts += ["## How it was computed", method(content), "## Answer", f"**{conclude(content)}**"]
    return "\n\n".join(parts) + "\n"


def method(content: dict[str, Any]) -> str:
    """Return the description of how the numbers were computed."""
    design, plan = content["design"], content["sequential"]
    pool = RULES[design["pool"]].format(**design)
    arms = [arm for study in content["studies"] for arm in study["arms"]]
    return METHOD.format(
        **design
        | {
            "score": SCORES[design["score"]],
            "decisive": ", ".join(design["controls"] if design["decisive"] is None else design["decisive"]),
            "measures": " and ".join(design["measures"]),
            "level": ONE_SIDED,
            "looks": LOOKS.format(looks=", ".join(map(str, plan["looks"])), spending=plan["spending"]) if plan else "",
            "coverage": coverage_text(
                min(arm["seeds"] for arm in arms), any(arm["collapsed"]["count"] for arm in arms)
            ),
            "pool": POOL.format(rule=pool, first=design["measures"][0]) if content["pooled"] else "",
        }
    )


def _registration(registration: dict[str, Any]) -> str:
    late, changed = registration["runs_before"], registration["changed"]
    when = f"after {late} of the runs had begun, so nothing here was predicted" if late else "before the first run"
    lines = [
        f"Rules and predictions were fixed on {registration['time']}, {when} (SHA-256 `{registration['sha256']}`)."
    ]
    if not registration["intact"]:
        lines.append("**The file was changed since: its content does not have this hash.**")
    if changed:
        lines.append(f"**This report judges by other rules than were fixed: {', '.join(changed)}.**")
    table = [tables.predictions(registration)] if registration["predictions"] else []
    return "\n\n".join(["## Predicted and seen" if table else "## Registration", " ".join(lines), *table])


def _together(content: dict[str, Any]) -> str:
    parts = ["## All conditions together"]
    if content["interaction"]:
        verdict = depends(content["interaction"]).strip(" ()")
        found = "No dependence of the difference on the condition is significant."
        parts += [tables.interactions(content), f"{verdict[0].upper()}{verdict[1:]}." if verdict else found]
    parts.append(tables.learnings(content))
    together = content["pooled"]
    if not together["studies"]:
        parts.append(f"Nothing is pooled: {nothing_pooled(content)}.")
    elif together["answer"] is not None:
        parts += [f"Pooled: {', '.join(together['studies'])}.", tables.answers(together)]
    if content["tuned"]["arms"]:
        parts.append(tables.tuned(content))
    return "\n\n".join(parts)


def _study(study: dict[str, Any], design: dict[str, Any]) -> str:
    evaluations = ", ".join(map(str, study["evaluations"]))
    size = (
        f"{study['steps']} steps, {study['questions']} held-out questions with {study['samples']} samples each, evaluated at "
        f"step {evaluations}; {len(study['seeds'])} seeds ({', '.join(map(str, study['seeds']))})."
    )
    notes = ["\n".join(f"- {note}" for note in study["notes"])] if study["notes"] else []
    parts = [f"## {study['study']}", size, *notes, tables.arms(study), tables.collapses(study)]
    if study["comparisons"]:
        parts.append(tables.comparisons(study))
    if study["doses"]:
        parts.append(tables.doses(study))
    if study["answers"]["answer"] is not None:
        parts.append(tables.answers(study["answers"]))
    return "\n\n".join([*parts, f"{QUESTION}: {phrase(study['answers'], design, study['questions'])}."])
