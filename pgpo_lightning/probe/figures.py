"""Figures of a probe and of a calibration."""

from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure

from pgpo_lightning.probe.line import Line


def draw_gaps(content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw the net gap of every context and control with two standard errors, on both scales.

    Args:
        content: Content of ``probe.json``.
        file: Where the PNG goes.
    """
    rows = [row for row in content["contexts"] if row["name"] != "none"][::-1]
    figure = Figure(figsize=(7.5, 1.3 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(rows))
    for key, shift, colour, label in (
        ("net", 0.14, "C0", "all rollouts for which it is available (as in SDPO)"),
        ("net_failed", -0.14, "C1", "failed rollouts only (arXiv 2605.30070)"),
    ):
        values = [row[key]["value"] for row in rows]
        errors = [2 * row[key]["error"] for row in rows]
        axis.errorbar(
            values, positions + shift, xerr=errors, fmt="o", markersize=4, capsize=2, color=colour, label=label
        )
    axis.axvline(0, color="black", linewidth=0.8)
    names = [row["name"] if row["control"] is None else f"control: {row['name']}" for row in rows]
    axis.set_yticks(
        positions,
        [f"{name}  ({row['coverage']:.0%} covered)" for name, row in zip(names, rows, strict=True)],
        fontsize=8,
    )
    controls = sum(row["control"] is not None for row in rows)
    if controls:
        axis.axhspan(-0.5, controls - 0.5, color="grey", alpha=0.12, linewidth=0)
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_xlabel(
        "net gap: teacher's score minus student's, minus the same for `none`, ± 2 standard errors", fontsize=8
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    figure.savefig(file, dpi=110)


def draw_line(line: Line, content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw gains against gaps, with the line and the prediction interval of a new configuration.

    Args:
        line: The fitted line.
        content: From :func:`pgpo_lightning.probe.probe_report.calibration_content`.
        file: Where the PNG goes.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axis = figure.subplots()
    low, high = content["range"]
    grid = np.linspace(low, high, 100)
    predicted = np.array([line.predict(gap, extrapolate=True) for gap in grid])
    axis.plot(
        grid, predicted[:, 0], color="black", linewidth=1.2, label=f"Δ = {line.intercept:+.3f} {line.slope:+.3f} g"
    )
    band = (predicted[:, 0] - predicted[:, 1], predicted[:, 0] + predicted[:, 1])
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
    for i, row in enumerate(
        sorted(rows, key=lambda row: row["gap"])
    ):  # alternate above and below, so that labels do not overlap
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
    axis.set_xlabel("net gap before training (teacher's score minus student's, minus the same for `none`)", fontsize=9)
    axis.set_ylabel("gain of training (held-out score)", fontsize=9)
    axis.set_title(f"leave-one-out RMSE {line.loo_rmse:.3f}; without the gap {line.loo_constant:.3f}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
