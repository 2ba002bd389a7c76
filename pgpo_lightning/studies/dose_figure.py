"""One picture of the score against learning rate x dose: are arms different, or do they lie on one curve of their mean rate?"""

from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.comparisons import Arm, Condition
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.figures import arm_style, half_width

EFFECTIVE, MULTIPLIER = "lr/effective", "lr/multiplier"


def base_rate(run: RunRecord) -> float | None:
    """Return the mean learning rate of a run without its multiplier; None for a run that did not log one.

    The optimizer's rate is logged with the multiplier in it (``lr/effective``).
    """
    if EFFECTIVE not in run.curves or MULTIPLIER not in run.curves:
        return None
    rates, multipliers = (dict(zip(*run.curves[tag], strict=True)) for tag in (EFFECTIVE, MULTIPLIER))
    each = [rates[step] / multipliers[step] for step in rates if multipliers.get(step)]
    return float(np.mean(each)) if each else None


def mean_rates(condition: Condition) -> dict[str, float]:
    """Return the mean learning rate x dose of each arm of a condition; empty if no run logged a learning rate.

    Arms without a multiplier, such as the baseline, have the base rate of the others.
    """
    runs = [run for arm in condition.arms.values() for run in arm.runs]
    found = [rate for run in runs if (rate := base_rate(run)) is not None]
    if not found:
        return {}
    rate = float(np.mean(found))
    return {name: rate * float(arm.doses.mean()) for name, arm in condition.arms.items()}


def draw_doses(groups: list[Condition], design: Design, file: IO[bytes]) -> None:
    """Draw the first deciding measure of every arm under every condition against its mean learning rate x dose.

    Bars are 95 % intervals of the mean over seeds, for these questions. The grey line is the base model.

    Args:
        groups: The conditions; those without a logged learning rate are left out.
        design: For the measure and the names of the arms.
        file: Where the PNG goes.
    """
    rates = {condition.name: mean_rates(condition) for condition in groups}
    names = list(dict.fromkeys(name for condition in groups for name in condition.arms))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(float(np.mean([arm.base.mean() for group in groups for arm in group.arms.values()])), color="0.7")
    for name in names:
        members = [(rates[group.name][name], group.arms[name]) for group in groups if name in rates[group.name]]
        if members:
            _draw_arm(axis, name, sorted(members, key=lambda member: member[0]), names, design)
    axis.set_xscale("log")
    axis.set_xlabel("mean learning rate × dose")
    axis.set_ylabel(f"{design.measures[0]} held-out score (grey: base model)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)


def _draw_arm(axis: Axes, name: str, members: list[tuple[float, Arm]], names: list[str], design: Design) -> None:
    scores = [arm.tables[design.measures[0]].mean(axis=1) for _, arm in members]
    means, errors = [float(score.mean()) for score in scores], [half_width(score.tolist()) for score in scores]
    style = arm_style(name, names, design) | {"linewidth": 0.8, "elinewidth": 0.8}
    marker = "s" if name == design.baseline else "o" if design.suffix(name) is not None else "^"
    axis.errorbar([rate for rate, _ in members], means, yerr=errors, label=name, marker=marker, markersize=5, **style)
