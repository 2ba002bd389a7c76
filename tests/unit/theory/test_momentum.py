"""What momentum leaves of a multiplier: against torch's optimizers, sums written out, and the formula."""

import json

import numpy as np
import pytest
import torch

from benchmarks.theory.command import run
from benchmarks.theory.momentum import (
    CASES,
    Case,
    Outcome,
    Problem,
    draws,
    momentum,
    outcome,
    predicted,
    retained,
    train,
    weights_of_batches,
)

SMALL = Problem(dimensions=3, steps=40)


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_torchs_optimizers(name):
    case = CASES[name]
    misleading, believed, noise = draws(SMALL, case, [4])
    rho = np.where(believed, SMALL.low, SMALL.high)
    theta = torch.nn.Parameter(torch.full((SMALL.dimensions,), SMALL.start, dtype=torch.float64))
    optimizer = (
        torch.optim.SGD([theta], lr=SMALL.rate)
        if case.optimizer == "sgd"
        else torch.optim.Adam([theta], lr=SMALL.rate, betas=(case.momentum, 0.999))
    )
    for step in range(SMALL.steps):
        gradient = theta.detach() - SMALL.wrong * float(misleading[step, 0]) + torch.tensor(noise[step, 0])
        factor = float(rho[step, 0])
        theta.grad = gradient * factor if case.acts_on == "gradient" else gradient
        optimizer.param_groups[0]["lr"] = SMALL.rate * (factor if case.acts_on == "update" else 1.0)
        optimizer.step()
    ours = train(SMALL, case, rho, misleading, noise)
    np.testing.assert_allclose(ours[0], theta.detach().numpy(), rtol=1e-9)


def test_the_weight_of_a_batch_is_its_share_of_all_updates():
    """With rho on the update: the derivative of the summed updates to each gradient, computed by running the momentum."""
    rho, b = np.random.default_rng(0).uniform(0.5, 2, 12), 0.8
    for batch in range(len(rho)):
        moment, total = 0.0, 0.0
        for step in range(len(rho)):
            moment = b * moment + (1 - b) * (step == batch)
            total += rho[step] * moment
        assert weights_of_batches(rho, b)[batch] == pytest.approx(total)


@pytest.mark.parametrize("block", [1, 5, 10, 40])
def test_the_retained_share_is_the_slope_of_weight_on_rho(block):
    rng = np.random.default_rng(1)
    rho = np.repeat(rng.choice([1.0, 2.0], 40_000), block)
    weights = weights_of_batches(rho, 0.9)
    slope = np.cov(rho, weights)[0, 1] / rho.var()
    assert slope == pytest.approx(retained(0.9, block), abs=0.01)


def test_without_momentum_everything_is_retained():
    rho = np.array([1.0, 3.0, 2.0])
    assert retained(0.0, 1) == retained(0.0, 7) == 1
    np.testing.assert_array_equal(weights_of_batches(rho, 0.0), rho)


def test_a_constant_on_the_gradient_changes_nothing_under_adam_and_everything_under_sgd():
    def end(optimizer, factor):
        case = Case(optimizer=optimizer, momentum=0.9 * (optimizer == "adam"), acts_on="gradient")
        misleading, _, noise = draws(SMALL, case, [0, 1])
        return train(SMALL, case, np.full((SMALL.steps, 2), factor), misleading, noise)

    np.testing.assert_allclose(end("adam", 2.0), end("adam", 1.0), rtol=1e-6)  # up to Adam's epsilon
    assert abs(end("sgd", 2.0) - end("sgd", 1.0)).min() > 0.01


def test_the_multiplier_on_the_update_gains_what_the_formula_says_and_a_blind_one_nothing():
    full = outcome(Problem(), Case(momentum=0.0), list(range(20)))
    found = outcome(Problem(), Case(), list(range(20)))
    assert found.gain == pytest.approx(predicted(Case(), full), abs=3 * found.standard_error + 0.003)
    assert 0.05 < found.gain < 0.2 * full.gain
    blind = outcome(Problem(), Case(momentum=0.0, agreement=0.5), list(range(20)))
    assert abs(blind.gain) < 3 * blind.standard_error
    assert outcome(Problem(), Case(momentum=0.0, agreement=0.0), list(range(20))).gain < -0.5


def test_the_formula_says_nothing_of_other_optimizers_and_inverted_signals():
    full = Outcome(0.6, 0.01, 1.5, -0.5)
    assert predicted(Case(momentum=0.0), full) is None
    assert predicted(Case(optimizer="sgd", momentum=0.0), full) is None
    assert predicted(Case(agreement=0.0), full) is None
    assert predicted(Case(agreement=0.5), full) == 0
    assert predicted(Case(acts_on="gradient"), full) == pytest.approx(0.5 * (1.5**2 - 1))


def test_the_command_writes_a_report(tmp_path, capsys):
    run(momentum, ["--seeds", "3", "--problem.steps", "80", "--output", str(tmp_path / "out")])
    assert "on the gradient before the moments" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "momentum.json").read_text())
    assert [row["case"] for row in content["rows"]] == list(CASES)
    assert "| rho on the gradient | 1.00 |" in (tmp_path / "out" / "momentum.md").read_text()
    assert (tmp_path / "out" / "momentum.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="`seeds` to be at least 2"):
        run(momentum, ["--seeds", "1"])
