"""The picture of :mod:`benchmarks.theory.estimator`: bias where the truth is known, spread and calibration on the toy, rho."""

from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_COLOURS = {"entropy-difference": "C0", "kl": "C1", "log-ratio": "C2"}


def draw(content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw what ``estimator.json`` holds.

    Args:
        content: From :func:`benchmarks.theory.estimator.estimator`.
        file: Where the PNG goes.
    """
    figure = Figure(figsize=(16, 10), layout="constrained")
    ((one, two, three), (four, five, six)) = figure.subplots(2, 3)
    _students(one, content)
    _lengths(two, content["source_lengths"], "known source, calibrated student: by length")
    _lengths(three, content["toy_lengths"], "toy: the first tokens of a response")
    _spread(four, content)
    _calibration(five, content)
    _multiplier(six, content)
    for axis in (one, two, three, four, five, six):
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, framealpha=0.7)
    figure.savefig(file, dpi=90, pil_kwargs={"optimize": True})


def _students(axis: Axes, content: dict[str, Any]) -> None:
    rows = content["students"]
    at = np.arange(len(rows))
    for place, (key, colour) in enumerate(
        zip(("entropy_difference", "kl", "log_ratio"), _COLOURS.values(), strict=True)
    ):
        axis.bar(at + 0.27 * (place - 1), [row[key] for row in rows], 0.25, color=colour, label=key.replace("_", "-"))
    axis.axhline(rows[0]["truth"], color="black", linewidth=1, linestyle="--", label="I(Y;F) / tokens")
    axis.set_xticks(at, [f"{row['student']}, {row['pairing']}" for row in rows], rotation=40, ha="right", fontsize=9)
    axis.set_title(f"known source, {content['length']} tokens: expectations (exact)", fontsize=11)
    axis.set_ylabel("nats per token", fontsize=10)


def _lengths(axis: Axes, rows: list[dict[str, Any]], title: str) -> None:
    lengths = [row["length"] for row in rows]
    for name, colour in _COLOURS.items():
        value, low, high = (np.array([row[name][key] for row in rows]) for key in ("value", "low", "high"))
        axis.errorbar(
            lengths, value, [value - low, high - value], marker="o", markersize=3, capsize=2, color=colour, label=name
        )
    if "truth" in rows[0]:
        axis.plot(lengths, [row["truth"] for row in rows], "k--", linewidth=1, label="I(Y;F) / tokens")
    axis.set_xscale("log")
    _ticks(axis, lengths)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("tokens", fontsize=10)


def _spread(axis: Axes, content: dict[str, Any]) -> None:
    for name, colour in _COLOURS.items():
        rows = [row for row in content["toy_batches"] if row["estimator"] == name]
        size = [row["sequences"] for row in rows]
        axis.loglog(size, [row["spread"] for row in rows], "o-", markersize=3, color=colour, label=f"{name}, toy")
        rows = [row for row in content["source_batches"] if row["estimator"] == name]
        size = [row["sequences"] for row in rows]
        axis.loglog(size, [row["spread"] for row in rows], "s:", markersize=3, color=colour, label=f"{name}, source")
    axis.set_title("spread of I over batches (nats)", fontsize=11)
    axis.set_xlabel("sequences with a teacher", fontsize=10)


def _calibration(axis: Axes, content: dict[str, Any]) -> None:
    for name, colour in _COLOURS.items():
        rows = [row for row in content["toy_batches"] if row["estimator"] == name]
        size = [row["questions"] for row in rows]
        axis.plot(
            size,
            [row["calibration"] for row in rows],
            "o-",
            markersize=3,
            color=colour,
            label=f"{name}, over sequences",
        )
        axis.plot(
            size, [row["clustered"] for row in rows], "^:", markersize=3, color=colour, label=f"{name}, over questions"
        )
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    _ticks(axis, size)
    axis.set_title("toy: standard error / true spread (1 is calibrated)", fontsize=11)
    axis.set_xlabel("questions per batch", fontsize=10)


def _multiplier(axis: Axes, content: dict[str, Any]) -> None:
    for name, colour in _COLOURS.items():
        rows = [row for row in content["multiplier"] if row["estimator"] == name]
        alpha = [row["sensitivity"] for row in rows]
        needed = [np.nan if row["needed"] is None else row["needed"] for row in rows]
        if np.isnan(needed).all():  # rho stays at a bound
            continue
        axis.loglog(alpha, needed, "o-", markersize=4, color=colour, label=name)
    axis.axhline(256, color="black", linewidth=1, linestyle="--", label="256, the paper's batch")
    _ticks(axis, alpha)
    axis.set_title(f"toy: sequences until sd(ρ)/ρ < {100 * content['spread']:g} %", fontsize=11)
    axis.set_xlabel("α", fontsize=10)


def _ticks(axis: Axes, at: list[float]) -> None:
    axis.set_xticks(at, [f"{value:g}" for value in at])
    axis.xaxis.set_minor_locator(NullLocator())
