"""Discrete PGPO against its stochastic differential equations, where the answer is known.

PGPO's Theorem 2(ii) (arXiv 2606.03620) calls ``d theta = -rho grad L dt + sqrt(eta) Sigma^1/2 dW`` an approximation of weak order
1. This measures orders, stationary variances and the bound on the variance of rho; ``docs/theory.md`` says what follows.
"""

import math
from typing import Annotated, Any

import numpy as np

from benchmarks.theory import sde_bernoulli, sde_quadratic
from benchmarks.theory.command import run, write_note
from benchmarks.theory.multiplier_law import multiplier_law, variance_bound
from benchmarks.theory.sde_adam import RULES, simulate
from benchmarks.theory.sde_bernoulli import Bernoulli
from benchmarks.theory.sde_figures import draw
from benchmarks.theory.sde_orders import FLOOR, Order, fit_order
from benchmarks.theory.sde_quadratic import Quadratic
from pgpo_lightning.core.files import markdown_table, output_folder
from pgpo_lightning.core.settings import Filled, Positive, Range, Seed, Text, UpperBound, checked

NOTES = """\
**Errors** are SDE minus discrete PGPO at the horizon, without sampling error: closed forms on the quadratic, powers of transfer
matrices on the Bernoulli problem. **Order** is the slope of log |error| over log eta with the 95 % interval of a straight line:
how far higher orders bend it; *last two*: between the two smallest eta. **At eta 0** is what is left of the error when eta goes
to 0 (a parabola through the last three). **Relative**: at the smallest eta, to the value under PGPO.
`paper`: diffusion sqrt(eta) Sigma^1/2; `scaled`: sqrt(eta) rho Sigma^1/2; `matched`: drift and covariance of rho * gradient;
`order-2 drift`: the same with the drift of order 2; `no noise`: the drift alone.
Where `bernoulli.rho_min` or `rho_max` bounds rho, its kink leaves errors of about 1e-5 that are the interpolation's: orders are
not to be read there without more `bernoulli.nodes`."""


@checked
def sde(
    output: Text = "sde",
    etas: list[Positive] = [0.2, 0.1, 0.05, 0.025, 0.0125],  # noqa: B006  (shown by --help, never changed)
    rhos: Annotated[list[Positive], Filled()] = [1.0, 1.5, 2.0],  # noqa: B006
    horizon: Positive = 1.0,
    quadratic: Quadratic = Quadratic(),  # noqa: B008
    stationary_eta: Positive = 0.05,
    bernoulli: Bernoulli = Bernoulli(),  # noqa: B008
    bernoulli_horizon: Positive = 4.0,
    information: float = 0.07,
    deviations: Annotated[list[Positive], Filled()] = [0.005, 0.02, 0.08],  # noqa: B006
    sensitivities: Annotated[list[Positive], Filled()] = [0.5, 1.0, 1.5, 8.0],  # noqa: B006
    rho_max: UpperBound = 2.0,
    steps: Annotated[int, Range(least=2)] = 6000,
    chains: Annotated[int, Range(least=2)] = 400,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Measure how well the SDEs of PGPO describe it.

    Args:
        output: The folder to write ``sde.md``, ``sde.json`` and ``sde.png`` into; what is there is written over.
        etas: Different step sizes, at least three; each must divide the horizons.
        rhos: Constant multipliers on the quadratic; the last one is used for the orders.
        horizon: Time T on the quadratic; T / eta steps.
        quadratic: The quadratic.
        stationary_eta: Step size at which stationary variances are compared.
        bernoulli: The self-distillation problem with a multiplier that depends on state and batch.
        bernoulli_horizon: Time T there.
        information: Mean of I (nats) in the table on the variance of rho; 0.07 is that of the toy task.
        deviations: Standard deviations of I over batches (nats) there.
        sensitivities: PGPO's alpha there.
        rho_max: Upper bound of rho there; the lower is 1.
        steps: Steps of the simulations under SGD and Adam; the first half is not counted.
        chains: Number of simulated chains.
        seed: Seed of the simulations.

    Returns:
        What ``sde.json`` holds.

    Raises:
        ValueError: If a setting is out of range; names the field.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    _check(etas, rhos, horizon, bernoulli_horizon, quadratic, bernoulli, stationary_eta)
    content = {
        "etas": etas,
        "rhos": rhos,
        "stationary_eta": stationary_eta,
        "quadratic": _quadratic_errors(quadratic, etas, rhos[-1], horizon),
        "bernoulli": _bernoulli_errors(bernoulli, etas, bernoulli_horizon),
        "bernoulli_information": bernoulli.information,
        "stationary": [_stationary(quadratic, rho, stationary_eta) for rho in rhos],
        "bernoulli_stationary": [_settled(bernoulli, signal, stationary_eta) for signal in sde_bernoulli.SIGNALS],
        "simulated": [
            vars(simulate(quadratic, rule, rho, stationary_eta, steps, chains, seed)) for rule in RULES for rho in rhos
        ],
        "bound": [
            _bound(information, deviation, alpha, rho_max) for alpha in sensitivities for deviation in deviations
        ],
    }
    plain = write_note(folder, "sde", _markdown(content), content, lambda file: draw(content, file))
    print(f"{_summary(content)}\n\nreport: {folder / 'sde.md'}")
    return plain


def _check(
    etas: list[float],
    rhos: list[float],
    horizon: float,
    bernoulli_horizon: float,
    quadratic: Quadratic,
    bernoulli: Bernoulli,
    stationary_eta: float,
) -> None:
    if bernoulli.rho_min is not None and bernoulli.rho_min > bernoulli.rho_max:
        raise ValueError(
            f"Expected `bernoulli.rho_min` to be at most `bernoulli.rho_max` ({bernoulli.rho_max:g}), but got "
            f"{bernoulli.rho_min:g}."
        )
    if len(set(etas)) < max(3, len(etas)):
        raise ValueError(f"Expected `etas` to be at least three different step sizes, each once, but got {etas}.")
    if not rhos:
        raise ValueError("Expected `rhos` to be at least one multiplier, but got [].")
    if not all(0 < t < 1 for t in bernoulli.teachers):
        raise ValueError(f"Expected `bernoulli.teachers` to lie between 0 and 1, but got {bernoulli.teachers}.")
    for name, time in (("horizon", horizon), ("bernoulli_horizon", bernoulli_horizon)):
        for eta in etas:
            if (
                not math.isfinite(time / eta)
                or abs(time / eta - round(time / eta)) > 1e-9 * time / eta
                or round(time / eta) < 1
            ):
                raise ValueError(f"Expected `etas` to divide `{name}` ({time:g}) into whole steps, but got {eta:g}.")
    steepest = max(*rhos, 1.0) * quadratic.curvature
    if max(*etas, stationary_eta) * steepest >= 2:
        raise ValueError(
            f"Expected `etas` and `stationary_eta` to be below {2 / steepest:g}, where PGPO on the quadratic diverges, but got "
            f"{max(*etas, stationary_eta):g}."
        )
    # A logistic loss has curvature up to 1/4; within that a step never leaves the interval between the teachers.
    if max(*etas, stationary_eta) * bernoulli.rho_max > 4:
        raise ValueError(
            f"Expected `etas` and `stationary_eta` times `bernoulli.rho_max` to be at most 4, but got "
            f"{max(*etas, stationary_eta):g} times {bernoulli.rho_max:g}."
        )


def _errors(
    etas: list[float], approximate: list[dict[str, float]], exact: list[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    found = {}
    for function in exact[0]:
        errors = [a[function] - b[function] for a, b in zip(approximate, exact, strict=True)]
        order = fit_order(etas, errors)
        small, large, larger = np.argsort(etas)[:3]
        found[function] = {
            "errors": errors,
            "order": order._asdict(),
            "last_order": _slope(etas[small] / etas[large], errors[small], errors[large]),
            "at_zero": float(np.polyfit(*np.array([etas, errors])[:, [small, large, larger]], 2)[-1]),
            "relative": errors[small] / exact[small][function] if exact[small][function] else math.nan,
        }
    return found


def _slope(eta: float, small: float, large: float) -> float:
    if min(abs(small), abs(large)) < FLOOR or small * large < 0:  # rounding, or a change of sign in between
        return math.nan
    return math.log(small / large) / math.log(eta)


def _quadratic_errors(problem: Quadratic, etas: list[float], rho: float, time: float) -> dict[str, Any]:
    exact = [problem.discrete(rho, eta, round(time / eta)).expectations() for eta in etas]
    return {
        kind: _errors(etas, [problem.sde(kind, rho, eta, time).expectations() for eta in etas], exact)
        for kind in sde_quadratic.SDES
    }


def _bernoulli_errors(problem: Bernoulli, etas: list[float], time: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for signal in sde_bernoulli.SIGNALS:
        exact = [problem.discrete(signal, eta, round(time / eta)) for eta in etas]
        found[signal] = {
            kind: _errors(etas, [problem.sde(kind, signal, eta, time) for eta in etas], exact)
            for kind in sde_bernoulli.SDES
        }
    return found


def _stationary(problem: Quadratic, rho: float, eta: float) -> dict[str, float]:
    paper, scaled = (problem.sde_stationary(kind, rho, eta) for kind in ("paper", "scaled"))
    discrete = problem.discrete_stationary(rho, eta)
    return {
        "rho": rho,
        "discrete": discrete,
        "paper": paper,
        "scaled": scaled,
        "paper_euler": problem.sde_stationary("paper", rho, eta, euler_step=eta),
        "scaled_euler": problem.sde_stationary("scaled", rho, eta, euler_step=eta),
        "paper_ratio": discrete / paper,
        "scaled_ratio": discrete / scaled,
    }


def _settled(problem: Bernoulli, signal: sde_bernoulli.Signal, eta: float) -> dict[str, Any]:
    """Return mean and variance after so many steps that none changes them."""
    row: dict[str, Any] = {"signal": signal}
    found = {"discrete": problem.discrete(signal, eta, 2**20 if eta > 1e-3 else 2**30)}
    found |= {kind: problem.sde(kind, signal, eta, 1000.0) for kind in ("paper", "scaled", "matched")}
    for name, values in found.items():
        row |= {f"{name}_mean": values["mean"], f"{name}_variance": values["variance"]}
    mean = sum(problem.teachers) / 2
    return row | {"minimum": math.log(mean / (1 - mean))}


def _bound(mean: float, deviation: float, alpha: float, rho_max: float) -> dict[str, float]:
    law = multiplier_law(mean, deviation, alpha, 1.0, rho_max)
    bound = variance_bound(deviation, alpha, rho_max)
    return {
        "sensitivity": alpha,
        "deviation": deviation,
        "mean": law.mean,
        "variance": law.variance,
        "bound": bound,
        "loose": bound / law.variance if law.variance > 0 else math.inf,
    }


# ------------------------------------------------------------------------------------------------------------ words


def _markdown(content: dict[str, Any]) -> str:
    eta = content["stationary_eta"]
    parts = ["# Discrete PGPO and its SDEs", NOTES]
    parts += ["## A quadratic, rho constant", f"rho = {content['rhos'][-1]:g}.", _orders(content["quadratic"], content)]
    for signal, told in content["bernoulli"].items():
        what = {
            "state": "I from the state alone",
            "independent": "I from a batch of its own",
            "shared": "I from the gradient's batch, as in PGPO",
        }[signal]
        parts += [f"## Bernoulli self-distillation, {what}", _orders(told, content)]
    parts += [
        f"## Stationary variance on the quadratic, eta = {eta:g}",
        "In brackets: discrete PGPO over the SDE. *Euler*: the SDE simulated with steps of eta.",
        markdown_table(
            ["rho", "discrete", "paper", "scaled", "paper, Euler", "scaled, Euler"],
            [
                [
                    f"{row['rho']:g}",
                    f"{row['discrete']:.4f}",
                    f"{row['paper']:.4f} ({row['paper_ratio']:.2f})",
                    f"{row['scaled']:.4f} ({row['scaled_ratio']:.2f})",
                    f"{row['paper_euler']:.4f}",
                    f"{row['scaled_euler']:.4f}",
                ]
                for row in content["stationary"]
            ],
        ),
        f"## Stationary law of Bernoulli self-distillation, eta = {eta:g}",
        f"Mean (variance); the loss is least at {content['bernoulli_stationary'][0]['minimum']:.4f}.",
        markdown_table(
            ["I from", "discrete", "paper", "scaled", "matched"],
            [
                [row["signal"]]
                + [
                    f"{row[f'{name}_mean']:.4f} ({row[f'{name}_variance']:.5f})"
                    for name in ("discrete", "paper", "scaled", "matched")
                ]
                for row in content["bernoulli_stationary"]
            ],
        ),
        f"## Stationary variance under SGD and Adam, eta = {eta:g}",
        "Simulated, with 95 % intervals over chains; what rho multiplies stands behind the optimizer.",
        markdown_table(
            ["rho", *RULES],
            [
                [f"{rho:g}"]
                + [
                    f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
                    for row in content["simulated"]
                    if row["rho"] == rho
                ]
                for rho in content["rhos"]
            ],
        ),
        "## Var(rho) and its bound (alpha rho_max)² Var(I)",
        "Exact for normal I, rho between 1 and rho_max.",
        markdown_table(
            ["alpha", "sd of I", "mean rho", "sd of rho", "bound on it", "bound / Var(rho)"],
            [
                [
                    f"{row['sensitivity']:g}",
                    f"{row['deviation']:g}",
                    f"{row['mean']:.4f}",
                    f"{math.sqrt(row['variance']):.4f}",
                    f"{math.sqrt(row['bound']):.4f}",
                    f"{row['loose']:.2f}",
                ]
                for row in content["bound"]
            ],
        ),
        "![orders, stationary variances, bound](sde.png)",
        f"**{_summary(content)}**",
    ]
    return "\n\n".join(parts) + "\n"


def _orders(told: dict[str, Any], content: dict[str, Any]) -> str:
    etas = content["etas"]
    ends = etas.index(max(etas)), etas.index(min(etas))
    rows = []
    for kind, functions in told.items():
        for function, row in functions.items():
            slope = str(Order(**row["order"]))
            errors = [f"{row['errors'][i]:+.1e}" for i in ends]
            last = "–" if math.isnan(row["last_order"]) else f"{row['last_order']:.2f}"
            relative = "–" if math.isnan(row["relative"]) else f"{100 * row['relative']:+.1f} %"
            rows.append([kind, function, *errors, relative, slope, last, f"{row['at_zero']:+.0e}"])
    header = ["SDE", "of theta", *(f"error at {etas[i]:g}" for i in ends), "relative", "order", "last two", "at eta 0"]
    return markdown_table(header, rows)


def _summary(content: dict[str, Any]) -> str:
    """Return the answer in one sentence."""
    quadratic, last = content["quadratic"], content["stationary"][-1]
    told = {kind: Order(**quadratic[kind]["mean"]["order"]) for kind in ("paper", "scaled")}
    shift = content["bernoulli"]["shared"]["paper"]["mean"]["at_zero"]
    return (
        f"On the quadratic the order in the mean is {told['paper']} for the paper's SDE and {told['scaled']} for the scaled one; "
        f"the stationary variance at rho = {last['rho']:g} is {last['paper_ratio']:.2f} times that of the paper's SDE (rho² = "
        f"{last['rho'] ** 2:g}) and {last['scaled_ratio']:.2f} times that of the scaled one; with I from the gradient's own "
        f"batch the error of the paper's SDE in the mean is {shift:+.3f} at eta 0."
    )


if __name__ == "__main__":
    run(sde)
