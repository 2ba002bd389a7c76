"""What momentum leaves of a multiplier: how much weight a batch gets, and what that is worth where the answer is known.

With momentum b the update of step k is ``sum_i (1 - b) b^i g_(k-i)``. A multiplier rho_k of the *update* therefore gives the
gradient of batch j the weight ``w_j = (1 - b) sum_i b^i rho_(j+i)``: the batch that rho was made from gets 1 - b of it. A
multiplier of the *gradient*, before the moments, gives it rho_j. ``docs/theory.md`` says what follows.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.theory.command import run, write_note
from pgpo_lightning.core.files import markdown_table, output_folder
from pgpo_lightning.core.settings import Count, Multiplier, NonNegative, Positive, Range, Text, checked

Array = NDArray[np.float64]
BETA2, EPSILON = 0.999, 1e-8  # Adam's


def weights_of_batches(rho: Array, momentum: float) -> Array:
    """Return the weight of each batch's gradient, ``(1 - b) sum_i b^i rho_(j+i)``, as far as the steps go.

    Args:
        rho: Multipliers of the updates, shape ``(steps, ...)``.
        momentum: b, in [0, 1).

    Returns:
        Weights, of the same shape. The last ones lack the steps that never came.

    Example:
        >>> weights_of_batches(np.array([2.0, 1.0, 1.0]), 0.5)
        array([1.375, 0.75 , 0.5  ])
    """
    weights = np.zeros_like(rho, dtype=np.float64)
    later = np.zeros_like(rho[0], dtype=np.float64)
    for step in reversed(range(len(rho))):
        weights[step] = later = (1 - momentum) * rho[step] + momentum * later
    return weights


def retained(momentum: float, block: int) -> float:
    """Return the share f of a multiplier's variation that reaches its own batch, if rho is constant over blocks of batches.

    ``f = 1 - b (1 - b^L) / (L (1 - b))``; 1 - b for single batches, 1 without momentum.

    Example:
        >>> [round(retained(0.9, length), 2) for length in (1, 5, 10, 15, 40)]
        [0.1, 0.26, 0.41, 0.52, 0.78]
    """
    return 1 - momentum * (1 - momentum**block) / (block * (1 - momentum))


@dataclass(frozen=True)
class Case:
    """One way to train on batches of two kinds.

    Attributes:
        optimizer: ``adam`` or ``sgd`` (without momentum).
        momentum: Adam's beta1.
        acts_on: What rho multiplies.
        block: Batches of one kind in a row.
        agreement: Probability that the signal recognises the kind of a batch: 1 always, 0.5 blind, 0 inverted.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    acts_on: Literal["update", "gradient"] = "update"
    block: int = 1
    agreement: float = 1.0


CASES = {
    "rho on the update (PGPO as published)": Case(),
    "rho on the gradient": Case(acts_on="gradient"),
    "rho on the update, beta1 0": Case(momentum=0.0),
    "SGD, rho on the update": Case(optimizer="sgd", momentum=0.0),
    "blocks of 5, rho on the update": Case(block=5),
    "blocks of 10, rho on the update": Case(block=10),
    "blocks of 40, rho on the update": Case(block=40),
    "beta1 0, I blind to the kind": Case(momentum=0.0, agreement=0.5),
    "beta1 0, I high on the misleading kind": Case(momentum=0.0, agreement=0.0),
}
"""AdamW's moments, single batches and a perfect signal unless the name says otherwise."""


@partial(checked, prefix="problem.")
@dataclass(frozen=True)
class Problem:
    """A quadratic whose optimum is 0. Half of the batches pull to a wrong optimum instead.

    Attributes:
        dimensions: Dimensions of theta.
        steps: Optimizer steps.
        rate: Learning rate.
        start: Every entry of theta at the start.
        wrong: Every entry of the wrong optimum.
        noise: Standard deviation of each gradient entry.
        high: rho where the signal is high.
        low: rho where it is low.
    """

    dimensions: Count = 20
    steps: Count = 400
    rate: Positive = 0.01
    start: float = 1.5
    wrong: float = 3.0
    noise: NonNegative = 1.0
    high: Multiplier = 2.0
    low: Multiplier = 1.0


def draws(problem: Problem, case: Case, seeds: list[int]) -> tuple[Array, Array, Array]:
    """Return which batches mislead and which seem to, ``(steps, seeds)`` each, and the noise, ``(steps, seeds, d)``."""
    misleading, believed, noise = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        kinds = rng.random(math.ceil(problem.steps / case.block)) < 0.5
        kinds = np.repeat(kinds, case.block)[: problem.steps]
        misleading.append(kinds)
        believed.append(np.where(rng.random(problem.steps) < case.agreement, kinds, ~kinds))
        noise.append(rng.normal(size=(problem.steps, problem.dimensions)))
    return np.stack(misleading, 1), np.stack(believed, 1), np.stack(noise, 1)


def train(problem: Problem, case: Case, rho: Array, misleading: Array, noise: Array) -> Array:
    """Train once per seed and return theta at the end, shape ``(seeds, d)``.

    Args:
        problem: The quadratic.
        case: The optimizer, and what rho multiplies.
        rho: Multipliers, shape ``(steps, seeds)``.
        misleading: Batches that pull to the wrong optimum, shape ``(steps, seeds)``.
        noise: Noise of the gradients, shape ``(steps, seeds, d)``.
    """
    theta = np.full(noise.shape[1:], problem.start)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(problem.steps):
        gradient = theta - problem.wrong * misleading[step][:, None] + problem.noise * noise[step]
        scale = rho[step][:, None]
        if case.acts_on == "gradient":
            gradient, scale = gradient * scale, np.ones_like(scale)
        if case.optimizer == "sgd":
            theta = theta - problem.rate * scale * gradient
            continue
        first = case.momentum * first + (1 - case.momentum) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        mean, square = first / (1 - case.momentum ** (step + 1)), second / (1 - BETA2 ** (step + 1))
        theta = theta - problem.rate * scale * mean / (np.sqrt(square) + EPSILON)
    return theta


class Outcome(NamedTuple):
    """What a multiplier brought, over a constant of the same dose.

    Attributes:
        gain: Gain in ``-|theta|^2 / 2d``, paired by seed.
        standard_error: Standard error of the gain, over seeds.
        mean: Mean of the entries of theta with the constant.
        shift: By how much the multiplier moved that mean.
    """

    gain: float
    standard_error: float
    mean: float
    shift: float


def outcome(problem: Problem, case: Case, seeds: list[int]) -> Outcome:
    """Train with the signal and with its control.

    Under Adam a constant on the gradient cancels, so that the control of ``acts_on: gradient`` is rho = 1.
    """
    misleading, believed, noise = draws(problem, case, seeds)
    rho = np.where(believed, problem.low, problem.high)
    constant = np.ones_like(rho) if case.acts_on == "gradient" else np.broadcast_to(rho.mean(0), rho.shape)
    ours, control = (train(problem, case, each, misleading, noise) for each in (rho, constant))
    gains = 0.5 * (np.square(control) - np.square(ours)).mean(1)
    error = float(gains.std(ddof=1) / math.sqrt(len(seeds)))
    return Outcome(float(gains.mean()), error, float(control.mean()), float((ours - control).mean()))


def predicted(case: Case, full: Outcome) -> float | None:
    """Return the gain that f and the shift without momentum imply: the mean moves by f times that shift.

    None where the formula says nothing: the case that it starts from, another optimizer, an inverted signal.
    """
    if case.agreement == 0.5:
        return 0.0
    if case == Case(momentum=0.0) or case.optimizer == "sgd" or case.agreement != 1:
        return None
    share = 1.0 if case.acts_on == "gradient" else retained(case.momentum, case.block)
    return 0.5 * (full.mean**2 - (full.mean + share * full.shift) ** 2)


@checked
def momentum(
    output: Text = "momentum", seeds: Annotated[int, Range(least=2)] = 60, problem: Problem = Problem()
) -> dict[str, Any]:
    """Measure what a multiplier that recognises misleading batches gains, by what it multiplies and how much momentum there is.

    Args:
        output: Folder for momentum.md, momentum.json and momentum.png.
        seeds: Paired runs per case.
        problem: The quadratic.

    Returns:
        The content of momentum.json.

    Raises:
        ValueError: If a setting is out of range.
    """
    folder = output_folder(output)
    numbers = list(range(seeds))
    full = outcome(problem, Case(momentum=0.0), numbers)
    rows = []
    for name, case in CASES.items():
        found = outcome(problem, case, numbers)
        row = {
            "case": name,
            "retained": 1.0 if case.acts_on == "gradient" else retained(case.momentum, case.block),
            "predicted": predicted(case, full),
            "gain": found.gain,
            "standard_error": found.standard_error,
        }
        rows.append(row | {"settings": asdict(case)})
    content = {"problem": asdict(problem), "seeds": seeds, "full": full._asdict(), "rows": rows}
    plain = write_note(folder, "momentum", _markdown(content), content, lambda file: _draw(content, file))
    print(f"{_summary(content)}\n\nreport: {folder / 'momentum.md'}")
    return plain


def _summary(content: dict[str, Any]) -> str:
    update, gradient = content["rows"][0], content["rows"][1]
    return (
        f"A multiplier that recognises misleading batches gains {update['gain']:+.3f} on the update under Adam (predicted "
        f"{update['predicted']:+.3f}) and {gradient['gain']:+.3f} on the gradient before the moments."
    )


def _markdown(content: dict[str, Any]) -> str:
    lines = [
        [
            row["case"],
            f"{row['retained']:.2f}",
            "" if row["predicted"] is None else f"{row['predicted']:+.3f}",
            f"{row['gain']:+.3f} ({row['standard_error']:.3f})",
        ]
        for row in content["rows"]
    ]
    head = ["case", "f", "predicted gain", "gain (standard error)"]
    problem = content["problem"]
    return "\n".join(
        [
            "# What momentum leaves of a multiplier",
            "",
            _summary(content),
            "",
            f"Gain in -|theta|²/2d after {problem['steps']} steps, over a constant of the same dose; {content['seeds']} paired "
            "seeds. f: share of rho's variation that reaches its own batch. Predicted: the mean of theta moves by f times "
            "its shift with beta1 0.",
            "",
            markdown_table(head, lines),
            "",
            "![weights and gains](momentum.png)",
            "",
        ]
    )


def _draw(content: dict[str, Any], file: IO[bytes]) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    problem, steps = Problem(**content["problem"]), 60
    for block, colour in ((1, "C0"), (10, "C1")):
        _, believed, _ = draws(problem, Case(block=block), [0])
        rho = np.where(believed[:, 0], problem.low, problem.high)
        kind = "single batches" if block == 1 else f"blocks of {block}"
        left.step(range(steps), rho[:steps], where="mid", color=colour, alpha=0.35, label=f"rho, {kind}")
        left.plot(weights_of_batches(rho, 0.9)[:steps], color=colour, label=f"weight of the batch, {kind}")
    left.set_xlabel("batch")
    left.set_title("rho of the update, and the weight that its batch gets (beta1 0.9)", fontsize=10)
    left.legend(fontsize=8)
    shares, full = np.linspace(0, 1, 50), Outcome(**content["full"])
    gains = 0.5 * (full.mean**2 - (full.mean + shares * full.shift) ** 2)
    right.plot(shares, gains, "k--", linewidth=1, label="predicted from f")
    for row in content["rows"]:
        if row["settings"]["agreement"] == 1 and row["settings"]["optimizer"] == "adam":
            right.errorbar(
                row["retained"], row["gain"], 1.96 * row["standard_error"], fmt="o", capsize=2, label=row["case"]
            )
    right.set_xlabel("f, the share of rho's variation that reaches its own batch")
    right.set_ylabel("gain over a constant of the same dose")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    run(momentum)
