"""The pictures of a probe and of a calibration."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pgpo_lightning.probe.line import Line


def draw_gaps(content: dict[str, Any], path: Path) -> None:
    """Draw the net gap of every context and control with two standard errors, on both scales.

    Args:
        content: What ``probe.json`` holds.
        path: Of the PNG.
    """
    rows = [row for row in content["contexts"] if row["name"] != "none"][::-1]
    figure = Figure(figsize=(7.5, 1.3 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    at = np.arange(len(rows))
    for key, shift, colour, label in (
        ("net", 0.14, "C0", "all rollouts that can (as SDPO trains)"),
        ("net_failed", -0.14, "C1", "failed rollouts only (arXiv 2605.30070)"),
    ):
        values = [row[key]["value"] for row in rows]
        errors = [2 * row[key]["error"] for row in rows]
        axis.errorbar(values, at + shift, xerr=errors, fmt="o", markersize=4, capsize=2, color=colour, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    names = [row["name"] if row["control"] is None else f"control: {row['name']}" for row in rows]
    axis.set_yticks(
        at, [f"{name}  ({row['coverage']:.0%} covered)" for name, row in zip(names, rows, strict=True)], fontsize=8
    )
    controls = sum(row["control"] is not None for row in rows)
    if controls:
        axis.axhspan(-0.5, controls - 0.5, color="grey", alpha=0.12, linewidth=0)
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_xlabel("teacher's score less the student's and less that of `none`, ± 2 standard errors", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def draw_line(line: Line, content: dict[str, Any], path: Path) -> None:
    """Draw gains over gaps with the line and the interval for a new configuration.

    Args:
        line: Through the points.
        content: From :func:`pgpo_lightning.probe.probe_report.calibration_content`.
        path: Of the PNG.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axis = figure.subplots()
    grid = np.linspace(*content["range"], 100)
    told = np.array([line.predict(gap, extrapolate=True) for gap in grid])
    axis.plot(grid, told[:, 0], color="black", linewidth=1.2, label=f"Δ = {line.intercept:+.3f} {line.slope:+.3f} g")
    band = (told[:, 0] - told[:, 1], told[:, 0] + told[:, 1])
    axis.fill_between(grid, *band, color="grey", alpha=0.15, linewidth=0, label="95 % prediction interval")
    rows = content["points"]
    axis.errorbar(
        [row["gap"] for row in rows],
        [row["gain"] for row in rows],
        xerr=[row["gap_error"] for row in rows],
        yerr=[row["gain_error"] for row in rows],
        fmt="o",
        markersize=5,
        capsize=2,
        color="C0",
        label="mean over seeds, ± standard error",
    )
    for row in rows:
        axis.scatter([row["gap"]] * len(row["seeds"]), row["gain_by_seed"], s=10, color="C1", zorder=3)
    low, high = content["range"]
    for i, row in enumerate(sorted(rows, key=lambda row: row["gap"])):  # above and below in turn, or neighbours overlap
        left = row["gap"] > low + 0.8 * (high - low)
        axis.annotate(
            row["name"],
            (row["gap"], row["gain"]),
            xytext=(-6 if left else 6, 8 if i % 2 else -15),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            fontsize=8,
        )
    axis.scatter([], [], s=10, color="C1", label="single seeds")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xlabel("net gap before training (teacher's score less the student's, less that of `none`)", fontsize=9)
    axis.set_ylabel("gain of training (held-out score)", fontsize=9)
    axis.set_title(f"leave-one-out error {line.loo_rmse:.3f}; without the gap {line.loo_constant:.3f}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
