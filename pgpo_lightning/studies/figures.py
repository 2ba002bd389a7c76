"""Figures of a report: curves with intervals, a forest plot of the differences, multipliers and information over time."""

from collections.abc import Callable
from functools import partial
from typing import IO, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.comparisons import Arm, Condition
from pgpo_lightning.studies.design import Design

Curve = Callable[[RunRecord], tuple[list[float], list[float]]]
"""Steps and values of one run."""


def draw_curves(groups: list[Condition], design: Design, file: IO[bytes]) -> None:
    """Draw held-out score, length and entropy over the steps, one column per condition.

    A band is the 95 % interval of the mean over seeds, for these questions. Arms share seeds and questions. Whether two arms
    differ is therefore shown by the forest plot and not by overlapping bands.

    Args:
        groups: The conditions.
        design: For the names of the baseline and the information arms.
        file: Where the PNG goes.
    """
    rows: list[tuple[str, Curve]] = [
        ("held-out score", partial(_scores, score=design.score)),
        ("response length in training (tokens)", lambda run: measures.curve(run, measures.LENGTH)),
        ("entropy (nats per token)", lambda run: measures.curve(run, measures.ENTROPY)),
    ]
    _grid(groups, design, rows, file, "mean and 95 % interval over seeds")


def draw_multipliers(groups: list[Condition], design: Design, file: IO[bytes]) -> None:
    """Draw the multiplier rho and the information I over the steps, one column per condition."""
    rows: list[tuple[str, Curve]] = [
        ("multiplier ρ", lambda run: (list(range(1, len(run.rho) + 1)), run.rho)),
        ("information I (nats)", lambda run: measures.curve(run, measures.INFORMATION)),
    ]
    _grid(groups, design, rows, file, "mean and 95 % interval over seeds")


def draw_forest(content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw the paired differences of the first deciding measure with their 95 % intervals, one column per condition.

    Args:
        content: From :func:`pgpo_lightning.studies.analysis.analyse`.
        file: Where the PNG goes.
    """
    measure, margin = content["design"]["measures"][0], content["design"]["margin"]
    columns = [(study["study"], study["comparisons"]) for study in content["studies"]]
    height = 1.4 + 0.28 * max(1, *(len(rows) for _, rows in columns))
    figure = Figure(figsize=(5.2 * len(columns), height), layout="constrained")
    figure.suptitle(f"paired differences of the {measure} held-out score,\n95 % intervals, not corrected", fontsize=10)
    for axis, (name, rows) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axis.axvspan(-margin, margin, color="0.92", zorder=0)
        axis.axvline(0, color="0.4", linewidth=0.8, zorder=1)
        for position, row in enumerate(rows):
            result, colour = row[measure], "0.25" if row["kind"] == "baseline" else "C0"
            if np.isfinite(result["low"]):
                axis.plot([result["low"], result["high"]], [position, position], color=colour, linewidth=1.5)
            axis.plot(result["value"], position, "o", color=colour, markersize=4)
        labels = [f"{row['arm']} − {row['against']}" for row in rows]
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"difference (grey: ± {margin:g}, margin of interest)", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=110)


def _grid(groups: list[Condition], design: Design, rows: list[tuple[str, Curve]], file: IO[bytes], title: str) -> None:
    names = list(dict.fromkeys(name for condition in groups for name in condition.arms))
    figure = Figure(figsize=(4.6 * len(groups) + 2, 2.8 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(groups), squeeze=False, sharex="col", sharey="row")
    lines: dict[str, Any] = {}
    for (label, curve), line in zip(rows, axes, strict=True):
        for condition, axis in zip(groups, line, strict=True):
            for name, arm in condition.arms.items():
                drawn = _band(axis, arm, curve, **arm_style(name, names, design))
                lines |= {name: drawn} if drawn else {}
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label, fontsize=9)
    for condition, top, bottom in zip(groups, axes[0], axes[-1], strict=True):
        top.set_title(condition.name, fontsize=10)
        bottom.set_xlabel("step", fontsize=8)
    figure.legend(
        [lines[n] for n in names if n in lines], [n for n in names if n in lines], loc="outside right upper", fontsize=8
    )
    figure.savefig(file, dpi=110)


def _band(axis: Axes, arm: Arm, curve: Curve, **style: Any) -> Any:
    """Draw the mean over an arm's seeds and its interval, at each step that any of them has. Return the line."""
    by_step: dict[float, list[float]] = {}
    for run in arm.runs:
        for step, value in zip(*curve(run), strict=True):
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return None
    steps = sorted(by_step)
    means = np.array([np.mean(by_step[step]) for step in steps])
    half = np.array([half_width(by_step[step]) for step in steps])
    axis.fill_between(steps, means - half, means + half, color=style["color"], alpha=0.1, linewidth=0)
    return axis.plot(steps, means, **style)[0]


def half_width(values: list[float]) -> float:
    """Return half of the width of the 95 % interval of a mean over seeds; 0 for a single one."""
    n = len(values)
    return float(student_t.isf(0.025, n - 1) * np.std(values, ddof=1)) / n**0.5 if n > 1 else 0.0


def _scores(run: RunRecord, score: measures.Score) -> tuple[list[float], list[float]]:
    return list(measures.evaluations(run, score)), measures.answers(run, score).mean(axis=1).tolist()


def arm_style(name: str, names: list[str], design: Design) -> dict[str, Any]:
    """Return the line style: the baseline is black, information arms are solid, others dashed; one colour per arm."""
    if name == design.baseline:
        return {"color": "black", "linewidth": 1.5}
    others = [other for other in names if other != design.baseline]
    colour = colormaps["tab20" if len(others) > 10 else "tab10"](others.index(name) % 20)
    return {"color": colour, "linewidth": 1.5, "linestyle": "-" if design.suffix(name) is not None else "--"}
