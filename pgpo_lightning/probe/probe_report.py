"""Reports of a probe and of a calibration, as Markdown and JSON."""

import math
from typing import Any

import numpy as np

from pgpo_lightning.core.files import markdown_table
from pgpo_lightning.probe.calibration import Bootstrap, Point, arguments
from pgpo_lightning.probe.contexts import Context
from pgpo_lightning.probe.gaps import Gap, Table, Value, kept
from pgpo_lightning.probe.line import Line, fit, reliability
from pgpo_lightning.probe.measure import Measured

_LINE = ("n", "intercept", "slope", "r2", "scatter", "loo_rmse", "loo_r2", "loo_constant")

SIGNIFICANT = 2
"""Standard errors by which a significant gap differs from 0."""

READING = """\
- **covered**: fraction of the rollouts that get the context; of the failed ones in brackets. The others keep their plain prompt
  and add exactly 0 to the net gap.
- **gap**: mean score of the teacher (the same weights sampling from the reprompt) minus the student's. **net gap**: minus the gap
  of `none`, a second sample from the plain prompt. In **net gap, failed only**, successes keep their plain prompt too, the scale
  of arXiv 2605.30070. In the other net gap, successes get the reprompt of `pgpo fit` with
  `reprompt.dont_reprompt_on_self_success` {own}.
- **recovery**: fraction of the failed rollouts whose teacher succeeds; in brackets, minus that of `none`.
- ± is a standard error: paired bootstrap over questions. A net gap of less than {sure} standard errors is not significant.
- Controls are not contexts for training. `answer`: a sibling's success, shortened to the shortest ending that the verifier
  accepts. The part of the gap that it keeps does not need the steps. `wrong`: a sibling's failure, presented as a success.
  `other`: a success of another question. A large part kept by `answer` means that the gap comes from the answer. A large part
  kept by `other` means that it comes from the form."""


def summary(context: Context, measured: Measured, gap: Gap, whole: Gap | None, draws: Table) -> dict[str, Any]:
    """Return the record of one context.

    Args:
        context: The context or control.
        measured: Its measurements.
        gap: Its gap.
        whole: The gap of `sibling`, for a control; None if it was not measured.
        draws: From :func:`pgpo_lightning.probe.gaps.question_draws`.
    """
    values = {name: value for name, value in vars(gap).items() if isinstance(value, Value | float)}
    record: dict[str, Any] = {"name": context.name, "control": context.control}
    record |= {name: vars(value) if isinstance(value, Value) else value for name, value in values.items()}
    record["significant"] = gap.net.value != 0 and abs(gap.net.value) >= SIGNIFICANT * gap.net.error
    length = measured.length[~np.isnan(measured.length)]
    record["length"] = float(length.mean()) if length.size else math.nan
    if context.control is not None and whole is not None and whole.net.value:
        record["keeps"] = dict(
            zip(("value", "low", "high"), kept(gap.by_question, whole.by_question, draws), strict=True)
        )
    record["seconds"] = measured.seconds
    record["example"] = measured.example
    record["settings"] = context.settings
    record["by_question"] = [round(float(value), 6) for value in gap.by_question]
    record["by_question_failed"] = [round(float(value), 6) for value in gap.by_question_failed]
    return record


def probe_report(content: dict[str, Any], figure: str) -> str:
    """Return the report of a probe.

    Args:
        content: Content of ``probe.json``.
        figure: File of the figure.
    """
    settings, student = content["settings"], content["student"]
    intro = (
        f"{settings['module']['model']}, {settings['questions']} {settings['split']} questions with {settings['samples']} "
        f"samples each, temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seed {settings['seed']}. Score of "
        f"the student: {_pm(student['score'], '.3f')}; {student['failed']:.1%} of its rollouts fail."
    )
    rows = []
    for row in content["contexts"]:
        covered = f"{row['coverage']:.2f} ({_number(row['coverage_failed'], '.2f')})"
        recovery = f"{_number(row['recovery']['value'], '.3f')} ({_pm(row['recovery_net'])})"
        name = row["name"] if row["control"] is None else f"*{row['name']}* (control)"
        scores = [_number(row["teacher"]["value"], ".3f"), _pm(row["gap"])]
        is_none = row["name"] == "none"
        nets = ["–", "–"] if is_none else [_pm(row["net"]), _pm(row["net_failed"])]
        recovery = _number(row["recovery"]["value"], ".3f") if is_none else recovery
        rows.append([name, covered, *scores, *nets, recovery, _number(row["length"], ".1f")])
    header = [
        "context",
        "covered (failed)",
        "teacher",
        "gap",
        "net gap",
        "net gap, failed only",
        "recovery (net)",
        "tokens",
    ]
    parts = ["# Probe", intro, markdown_table(header, rows), f"![net gaps]({figure})", "\n".join(_remarks(content))]
    own = str(arguments(settings["module"]["reprompt"])["dont_reprompt_on_self_success"]).lower()
    return "\n\n".join([*parts, "## How to read it", READING.format(own=own, sure=SIGNIFICANT)]) + "\n"


def _remarks(content: dict[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in content["contexts"]}
    student = content["student"]
    remarks = []
    if absent := [name for name, row in rows.items() if row["coverage"] == 0]:
        remarks.append(f"Available for no rollout: {', '.join(absent)} (no feedback, or no such sibling).")
    insignificant = [
        name
        for name, row in rows.items()
        if row["control"] is None and name != "none" and row["coverage"] and not row["significant"]
    ]
    if insignificant:
        remarks.append(f"Net gap not significant: {', '.join(insignificant)}.")
    if harm := [
        name for name, row in rows.items() if row["control"] is None and row["significant"] and row["net"]["value"] < 0
    ]:
        remarks.append(f"Negative net gap: {', '.join(harm)}.")
    remarks += [
        f"`{row['control']}`: {row['keeps']['value']:.0%} [{row['keeps']['low']:.0%}, {row['keeps']['high']:.0%}] of "
        "the net gap of `sibling`."
        for row in rows.values()
        if "keeps" in row
    ]
    best = max((row for row in rows.values() if row["control"] is None), key=lambda row: row["net"]["value"])
    if best["net"]["value"] > 0:
        remarks.append(
            f"Largest net gap: {best['name']}, {_pm(best['net'])}. A student that closed it would score about "
            f"{student['score']['value'] + best['net']['value']:.3f} at this temperature; more if the teacher improves too."
        )
    return [f"- {remark}" for remark in remarks]


def calibration_content(
    line: Line, points: list[Point], boot: Bootstrap, predictions: list[dict[str, Any]], scale: str
) -> dict[str, Any]:
    """Return the content of ``calibration.json``.

    Args:
        line: The fitted line.
        points: The points.
        boot: Their errors.
        predictions: With `name`, `gap`, `gain`, `half`, `inside`.
        scale: Of the gaps.
    """
    rows = [
        {
            "name": point.name,
            "context": point.context,
            "seeds": list(point.seeds),
            "steps": sorted(set(point.steps)),
            "gap": float(line.gaps[i]),
            "gap_error": float(boot.gaps[i]),
            "gain": float(line.gains[i]),
            "gain_error": float(boot.gains[i]),
            "gain_by_seed": [float(value) for value in point.gain.mean(axis=1)],
            "fitted": float(line.gains[i] - line.residuals[i]),
            "left_out": float(line.left_out[i]),
            "leverage": float(line.leverage[i]),
            "collapsed": point.collapsed,
        }
        for i, point in enumerate(points)
    ]
    stable = [i for i, point in enumerate(points) if not point.collapsed]
    rest = None
    if 3 <= len(stable) < line.n:
        rest = fit(line.gaps[stable], line.gains[stable])
    return {
        "scale": scale,
        **{name: getattr(line, name) for name in _LINE},
        "intercept_interval": line.intervals()[0],
        "slope_interval": line.intervals()[1],
        "slope_resampled": boot.interval(boot.slopes),
        "reliability": reliability(line.gaps, boot.noise),
        "without_collapsed": None if rest is None else {name: getattr(rest, name) for name in _LINE},
        "range": [float(line.gaps.min()), float(line.gaps.max())],
        "points": rows,
        "predictions": predictions,
    }


def calibration_report(content: dict[str, Any], figure: str) -> str:
    """Return the report of a calibration.

    Args:
        content: From :func:`calibration_content`.
        figure: File of the figure.
    """
    rows = [
        [
            row["name"],
            str(len(row["seeds"])),
            f"{row['gap']:+.3f} ± {row['gap_error']:.3f}",
            f"{row['gain']:+.3f} ± {row['gain_error']:.3f}",
            ", ".join(f"{value:+.3f}" for value in row["gain_by_seed"]),
            f"{row['fitted']:+.3f}",
            f"{row['left_out']:+.3f}",
            f"{row['leverage']:.2f}",
        ]
        for row in content["points"]
    ]
    header = ["run", "seeds", "net gap g", "gain Δ", "Δ by seed", "line", "leave-one-out error", "leverage"]
    a, b, resampled = content["intercept_interval"], content["slope_interval"], content["slope_resampled"]
    fitted = (
        f"**Δ = {content['intercept']:+.3f} {content['slope']:+.3f} g** from {content['n']} configurations, g on the scale of "
        f"{content['scale']} rollouts; a in [{a[0]:+.3f}, {a[1]:+.3f}], b in [{b[0]:+.3f}, {b[1]:+.3f}] (95 %, over other "
        f"configurations; b in [{resampled[0]:+.3f}, {resampled[1]:+.3f}] over other questions and seeds alone). "
        f"R² {content['r2']:.3f}, scatter {content['scatter']:.4f}. Leave-one-out RMSE {content['loo_rmse']:.4f} (R² "
        f"{content['loo_r2']:.3f} against the mean of all). Predicting the mean of the other runs, without the gap, gives "
        f"{content['loo_constant']:.4f}. Reliability of g: {content['reliability']:.3f}."
    )
    parts = [
        "# Calibration",
        fitted,
        markdown_table(header, rows),
        f"![gain against gap]({figure})",
        "\n".join(_warnings(content)),
    ]
    if content["predictions"]:
        cells = []
        for row in content["predictions"]:
            low, high = content["range"]
            where = "" if row["inside"] else f"**outside [{low:+.3f}, {high:+.3f}]**"
            gain = "not predicted" if row["gain"] is None else f"{row['gain']:+.3f} ± {row['half']:.3f}"
            cells.append([row["name"], f"{row['gap']:+.3f}", gain, where])
        parts += ["## Predictions", markdown_table(["context", "net gap", "gain, 95 % prediction interval", ""], cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _warnings(content: dict[str, Any]) -> list[str]:
    warnings = []
    heavy = [row for row in content["points"] if row["leverage"] > 0.7]
    if heavy:
        names = ", ".join(f"{row['name']} ({row['leverage']:.2f})" for row in heavy)
        warnings.append(f"High leverage: {names}. Without these points the slope may differ.")
    if collapsed := [row["name"] for row in content["points"] if row["collapsed"]]:
        remark = f"Fell below half of their first score: {', '.join(collapsed)}."
        if (rest := content["without_collapsed"]) is not None:
            remark += (
                f" Line through the other {rest['n']}: Δ = {rest['intercept']:+.3f} {rest['slope']:+.3f} g, R² {rest['r2']:.3f}, "
                f"leave-one-out RMSE {rest['loo_rmse']:.4f} (R² {rest['loo_r2']:.3f}), without the gap "
                f"{rest['loo_constant']:.4f}."
            )
        warnings.append(remark)
    if content["loo_rmse"] >= content["loo_constant"]:
        warnings.append(
            "**The gap predicts no better than the mean of the other runs.** Do not choose a context by this line."
        )
    if content["reliability"] < 0.8:
        warnings.append("The measurement errors of the gaps are too large for a line: use more questions.")
    if len(lengths := sorted({steps for row in content["points"] for steps in row["steps"]})) > 1:
        warnings.append(f"Runs of {', '.join(map(str, lengths))} steps: a line is valid for one length of training.")
    if any(len(row["seeds"]) < 2 for row in content["points"]):
        warnings.append("Single seeds: the errors of the gains do not include the variance between seeds.")
    return [f"- {line}" for line in warnings]


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _pm(row: dict[str, float], form: str = "+.3f") -> str:
    return "–" if math.isnan(row["value"]) else f"{row['value']:{form}} ± {row['error']:.3f}"
