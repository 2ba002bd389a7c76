"""Draw what a study of HAPO did over time: ``python benchmarks/hapo.py runs/lab-hapo docs/hapo.png``.

Above the share of groups with a demonstration, below the share of the student's own rollouts that succeeded; each line an arm,
the mean of its seeds over a moving window of five steps.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pgpo_lightning.lab.runs import Run, load_runs

PANELS = {"hapo/injected_groups": "groups with a demonstration", "critic/score/mean": "rollouts that succeed"}
WINDOW = 5


def curve(runs: list[Run], tag: str) -> np.ndarray | None:
    """Return the smoothed mean over runs of a curve, ``(steps - 4,)``, or none if it is not logged."""
    rows = [run.curves[tag][1] for run in runs if tag in run.curves]
    if not rows:
        return None
    return np.convolve(np.mean(rows, axis=0), np.ones(WINDOW) / WINDOW, mode="valid")


def draw(source: Path, output: Path) -> None:
    """Draw the picture of a folder of runs, or of a file with one run per line."""
    arms: dict[str, list[Run]] = {}
    for run in load_runs([source]):
        arms.setdefault(run.arm, []).append(run)
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axis, (tag, name) in zip(figure.subplots(2, 1), PANELS.items(), strict=True):
        for number, (arm, runs) in enumerate(arms.items()):
            if (values := curve(runs, tag)) is not None:
                style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                axis.plot(np.arange(len(values)) + WINDOW, values, label=f"{arm} ({len(runs)})", **style)
        axis.set(ylabel=name, xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, title="arm (seeds)", title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
