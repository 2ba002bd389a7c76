"""The picture of :mod:`benchmarks.theory.sde`: orders on top, stationary variances and the bound on Var(rho) below."""

from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.theory.sde_orders import Order

_COLOURS = {"paper": "C3", "scaled": "C0", "matched": "C2", "order-2 drift": "C4", "no noise": "0.5"}
_MARKERS = {"paper": "o", "scaled": "s", "matched": "^", "order-2 drift": "d", "no noise": "x"}
_STYLES = {"paper": "-", "scaled": "--", "matched": "-.", "order-2 drift": ":", "no noise": ":"}  # some lines coincide


def draw(content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw what ``sde.json`` holds.

    Args:
        content: From :func:`benchmarks.theory.sde.sde`.
        file: Where the PNG goes.
    """
    figure = Figure(figsize=(16, 10), layout="constrained")
    ((one, two, three), (four, five, six)) = figure.subplots(2, 3)
    rho, etas = content["rhos"][-1], content["etas"]
    _errors(one, etas, content["quadratic"], "mean", f"quadratic, ρ = {rho:g}: mean (legend: order, 95 %)")
    _errors(two, etas, content["quadratic"], "variance", f"quadratic, ρ = {rho:g}: variance (legend: order)")
    _errors(three, etas, content["bernoulli"]["shared"], "mean", "Bernoulli, I from the batch: mean (legend: order)")
    _stationary(four, content)
    _simulated(five, content)
    _bound(six, content)
    for axis in (one, two, three, four, five, six):
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, framealpha=0.7)
    figure.savefig(file, dpi=90, pil_kwargs={"optimize": True})


def _errors(axis: Axes, etas: list[float], told: dict[str, Any], function: str, title: str) -> None:
    for kind, functions in told.items():
        row = functions[function]
        label = f"{kind}: {Order(**row['order'])}"
        if np.isnan(row["order"]["value"]):
            axis.plot([], [], " ", label=label)
            continue
        axis.loglog(
            etas,
            np.abs(row["errors"]),
            marker=_MARKERS[kind],
            markersize=4,
            color=_COLOURS[kind],
            linestyle=_STYLES[kind],
            label=label,
        )
    _ticks(axis, etas)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step size η", fontsize=10)
    axis.set_ylabel("|SDE − discrete PGPO|", fontsize=10)


def _stationary(axis: Axes, content: dict[str, Any]) -> None:
    rows = content["stationary"]
    rhos = [row["rho"] for row in rows]
    axis.plot(rhos, [row["discrete"] for row in rows], "k-", linewidth=2, label="discrete PGPO")
    for kind in ("paper", "scaled"):
        axis.plot(
            rhos,
            [row[kind] for row in rows],
            marker=_MARKERS[kind],
            linestyle="--",
            color=_COLOURS[kind],
            label=f"{kind} SDE",
        )
    axis.set_title(f"quadratic, η = {content['stationary_eta']:g}: stationary variance (exact)", fontsize=11)
    axis.set_xlabel("ρ", fontsize=10)
    axis.set_ylim(bottom=0)


def _simulated(axis: Axes, content: dict[str, Any]) -> None:
    rules = list(dict.fromkeys(row["rule"] for row in content["simulated"]))
    rhos = np.array(content["rhos"])
    width = 0.02 * (np.ptp(rhos) or 1)
    for place, rule in enumerate(rules):
        rows = [row for row in content["simulated"] if row["rule"] == rule]
        value, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
        at = rhos + (place - (len(rules) - 1) / 2) * width
        axis.errorbar(at, value, [value - low, high - value], marker="o", markersize=3, capsize=2, label=rule)
    axis.set_title("the same, simulated: optimizer, what ρ multiplies (95 %)", fontsize=11)
    axis.set_xlabel("ρ", fontsize=10)
    axis.set_ylim(bottom=0)


def _bound(axis: Axes, content: dict[str, Any]) -> None:
    alphas = list(dict.fromkeys(row["sensitivity"] for row in content["bound"]))
    for place, alpha in enumerate(alphas):
        rows = [row for row in content["bound"] if row["sensitivity"] == alpha]
        deviations = [row["deviation"] for row in rows]
        colour = f"C{place}"
        axis.loglog(
            deviations,
            [row["variance"] ** 0.5 for row in rows],
            "o-",
            color=colour,
            markersize=4,
            label=f"α = {alpha:g}",
        )
        axis.loglog(deviations, [row["bound"] ** 0.5 for row in rows], ":", color=colour)
    _ticks(axis, deviations)
    axis.set_title("sd of ρ (dotted: its bound α ρ_max sd(I))", fontsize=11)
    axis.set_xlabel("sd of I over batches (nats)", fontsize=10)


def _ticks(axis: Axes, at: list[float]) -> None:
    """Name the values that there are, and no others."""
    axis.set_xticks(at, [f"{value:g}" for value in at])
    axis.xaxis.set_minor_locator(NullLocator())
