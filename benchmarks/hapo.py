"""Draw the curves of HAPO's studies.

Run: ``python -m benchmarks.hapo runs/study-hapo-rare runs/study-hapo docs/hapo/curves.png``.

A column per condition. Above the share of groups with a demonstration, below the share of the student's own rollouts that
succeeded; each line an arm, the mean of its seeds over a moving window of five steps.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pgpo_lightning.monitoring.run_record import RunRecord, load_runs

PANELS = {"hapo/injected_groups": "groups with a demonstration", "critic/score/mean": "rollouts that succeed"}
WINDOW = 5
FIRST = {"grpo": "black", "hapo-0.8": "magenta"}  # what every study has


def curve(runs: list[RunRecord], tag: str) -> np.ndarray | None:
    """Return the smoothed mean over runs of a curve, ``(steps - 4,)``, or none if it is not logged."""
    rows = [run.curves[tag][1] for run in runs if tag in run.curves]
    if not rows:
        return None
    return np.convolve(np.mean(rows, axis=0), np.ones(WINDOW) / WINDOW, mode="valid")


def draw(sources: list[Path], output: Path) -> None:
    """Draw the picture of folders of runs, or of files with one run per line."""
    studies: dict[str, dict[str, list[RunRecord]]] = {}
    for run in load_runs(sources):
        studies.setdefault(run.study, {}).setdefault(run.arm, []).append(run)
    arms = sorted({arm for study in studies.values() for arm in study} - FIRST.keys())
    colours = FIRST | {arm: colormaps["tab20"](number % 20) for number, arm in enumerate(arms)}
    figure = Figure(figsize=(4 * len(studies) + 2, 6), layout="constrained")
    axes = figure.subplots(2, len(studies), squeeze=False, sharex=True, sharey=True)
    lines = {}
    for column, (study, members) in zip(axes.T, studies.items(), strict=True):
        column[0].set_title(f"{study} ({max(map(len, members.values()))} seeds)", fontsize=10)
        for axis, tag in zip(column, PANELS, strict=True):
            for arm, runs in members.items():
                if (values := curve(runs, tag)) is not None:
                    steps = np.arange(len(values)) + WINDOW
                    width = 2.0 if arm in FIRST else 1.0
                    lines[arm] = axis.plot(steps, values, color=colours[arm], linewidth=width)[0]
            axis.set(ylim=(-0.02, 1.02))
            axis.grid(alpha=0.3)
        column[-1].set_xlabel("step")
    for axis, name in zip(axes[:, 0], PANELS.values(), strict=True):
        axis.set_ylabel(name)
    names = [*(arm for arm in FIRST if arm in lines), *(arm for arm in arms if arm in lines)]
    figure.legend([lines[arm] for arm in names], names, loc="outside right upper", fontsize=8)
    figure.savefig(output, dpi=70)


if __name__ == "__main__":
    *given, target = map(Path, sys.argv[1:])
    draw(given, target)
