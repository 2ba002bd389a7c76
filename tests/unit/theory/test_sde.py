"""The SDE study: against recursions, listed outcomes, an Ornstein-Uhlenbeck process and numerical integrals."""

import itertools
import json
import math

import numpy as np
import pytest

from benchmarks.theory.command import run, write_note
from benchmarks.theory.multiplier_law import multiplier_law, variance_bound
from benchmarks.theory.sde import _orders, _quadratic_errors, sde
from benchmarks.theory.sde_adam import simulate
from benchmarks.theory.sde_bernoulli import SIGNALS, Bernoulli, Chebyshev, binary_entropy
from benchmarks.theory.sde_orders import fit_order
from benchmarks.theory.sde_quadratic import SDES, Quadratic

PROBLEM = Quadratic(curvature=0.8, noise=1.3, start=0.7)
ETAS = [0.2, 0.1, 0.05, 0.025, 0.0125]

# --------------------------------------------------------------------------------------------------------- quadratic


def moments(rate, diffusion, step, steps, start):
    """Mean and variance of ``theta - step * rate * theta + sqrt(step * diffusion) * normal``, step by step."""
    mean, variance = start, 0.0
    for _ in range(steps):
        mean, variance = (1 - step * rate) * mean, (1 - step * rate) ** 2 * variance + step * diffusion
    return pytest.approx((mean, variance), rel=2e-4 if step < 1e-3 else 1e-12, abs=1e-12)


@pytest.mark.parametrize("rho", [1.0, 1.7])
def test_the_discrete_law_is_that_of_the_recursion(rho):
    # One step of PGPO: the noise enters with eta * rho * sigma.
    assert PROBLEM.discrete(rho, 0.1, 25) == moments(rho * 0.8, 0.1 * (rho * 1.3) ** 2, 0.1, 25, 0.7)
    assert PROBLEM.discrete(rho, 0.1, 5000).variance == pytest.approx(PROBLEM.discrete_stationary(rho, 0.1))


@pytest.mark.parametrize("kind", SDES)
def test_the_sdes_are_the_limits_of_their_euler_schemes(kind):
    rate, diffusion = PROBLEM.coefficients(kind, 1.7, 0.1)
    assert PROBLEM.sde(kind, 1.7, 0.1, 2.0) == moments(rate, diffusion, 2e-5, 100_000, 0.7)
    assert PROBLEM.sde(kind, 1.7, 0.1, 200.0).variance == pytest.approx(PROBLEM.sde_stationary(kind, 1.7, 0.1))


def test_the_stationary_variances_that_the_specification_gives():
    """0.026 / 0.039 / 0.053 at eta 0.05 for PGPO; those it gives for the SDEs are of simulations with steps of eta."""
    problem, rhos = Quadratic(), (1.0, 1.5, 2.0)
    assert [round(problem.discrete_stationary(rho, 0.05), 3) for rho in rhos] == [0.026, 0.039, 0.053]
    for kind, told in (("paper", (0.026, 0.018, 0.013)), ("scaled", (0.026, 0.040, 0.053))):
        euler = [problem.sde_stationary(kind, rho, 0.05, euler_step=0.05) for rho in rhos]
        exact = [problem.sde_stationary(kind, rho, 0.05) for rho in rhos]
        assert euler == pytest.approx(told, abs=0.0011)
        assert exact == pytest.approx(told, abs=0.0031)
    for rho in rhos:  # the paper's is off by rho squared, up to the step
        ratio = problem.discrete_stationary(rho, 1e-6) / problem.sde_stationary("paper", rho, 1e-6)
        assert ratio == pytest.approx(rho**2, rel=1e-5)


def test_both_sdes_are_of_order_one_in_the_mean_and_differ_in_the_variance():
    def order(kind, function):
        errors = []
        for eta in [eta / 8 for eta in ETAS]:
            exact = PROBLEM.discrete(2.0, eta, round(1 / eta)).expectations()
            errors.append(PROBLEM.sde(kind, 2.0, eta, 1.0).expectations()[function] - exact[function])
        return fit_order(ETAS, errors).value

    for kind in ("paper", "scaled", "no noise"):
        assert order(kind, "mean") == pytest.approx(1, abs=0.02)
    for kind in ("paper", "no noise"):
        assert order(kind, "variance") == pytest.approx(1, abs=0.02)
        assert order(kind, "second moment") == pytest.approx(1, abs=0.02)
    assert order("scaled", "variance") == pytest.approx(2, abs=0.02)
    for function in ("mean", "second moment", "variance", "cosine"):
        assert order("order-2 drift", function) == pytest.approx(2, abs=0.03)


def test_from_the_minimum_the_mean_is_exact_and_has_no_order():
    told = _quadratic_errors(Quadratic(start=0.0), ETAS, 2.0, 1.0)
    row = told["paper"]["mean"]
    assert row["errors"] == [0.0] * 5
    assert np.isnan([row["order"]["value"], row["last_order"], row["relative"]]).all()
    assert told["scaled"]["second moment"]["last_order"] == pytest.approx(2, abs=0.05)
    assert "| paper | mean | +0.0e+00 | +0.0e+00 | – | exact | – |" in _orders(told, {"etas": ETAS})


def test_a_fitted_order_with_its_interval():
    bent = fit_order(ETAS, [eta**2 + 3 * eta**3 for eta in ETAS])
    assert 2 < bent.value < 3
    assert bent.low < bent.value < bent.high
    assert fit_order(ETAS, [-5 * eta for eta in ETAS]) == pytest.approx((1, 1, 1))
    assert math.isnan(fit_order(ETAS, [0.0, *ETAS[1:]]).value)


# --------------------------------------------------------------------------------------------------------- Bernoulli


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("rho_min", [None, 1.0])
def test_a_power_of_the_map_is_the_mean_over_all_that_can_happen(signal, rho_min):
    """Three steps of a batch of two, every draw of feedbacks in turn."""
    problem = Bernoulli(batch=2, sensitivity=1.5, rho_min=rho_min, start=-1.0, nodes=400 if rho_min else 96)
    t, h = np.array([0.9, 0.3]), binary_entropy(np.array([0.9, 0.3]))
    total = {"mean": 0.0, "second moment": 0.0, "probability": 0.0}
    batches = list(itertools.product((0, 1), repeat=2))
    others = batches if signal == "independent" else [None]
    draws = list(itertools.product(itertools.product(batches, others), repeat=3))
    for path in draws:
        theta = -1.0
        for batch, other in path:
            student = 1 / (1 + math.exp(-theta))
            told = {"state": h.mean(), "shared": h[list(batch)].mean()}.get(signal)
            told = h[list(other)].mean() if told is None else told
            rho = min(math.exp(1.5 * (binary_entropy(np.array(student)) - told)), 2.0)
            rho = rho if rho_min is None else max(rho, rho_min)
            theta -= 0.3 * rho * (student - t[list(batch)].mean())
        for name, value in (("mean", theta), ("second moment", theta**2), ("probability", 1 / (1 + math.exp(-theta)))):
            total[name] += value / len(draws)
    found = problem.discrete(signal, 0.3, 3)
    # A floor of rho, and rho_max, put kinks where polynomials are less sure.
    assert {name: found[name] for name in total} == pytest.approx(total, rel=1e-3 if rho_min else 1e-4)


class OrnsteinUhlenbeck(Bernoulli):
    def coefficients(self, kind, signal, eta, theta):
        return -theta, np.full_like(theta, 0.1) * (1 + 0.2 * theta)


def test_the_map_of_an_sde_on_a_linear_one():
    """Drift -theta, diffusion 0.1 (1 + 0.2 theta): mean and second moment obey linear equations."""
    found = OrnsteinUhlenbeck(start=-1.0).sde("paper", "state", 0.1, 1.0)
    mean = -math.exp(-1)
    # d E[x^2]/dt = -2 E[x^2] + 0.01 (1 + 0.4 E[x] + 0.04 E[x^2]), E[x] = -exp(-t): a linear equation, solved by hand.
    rate = 2 - 0.0004
    particular = lambda t: 0.01 / rate - 0.004 * math.exp(-t) / (rate - 1)  # noqa: E731
    second = particular(1) + (1 - particular(0)) * math.exp(-rate)
    assert found["mean"] == pytest.approx(mean, abs=1e-7)
    assert found["second moment"] == pytest.approx(second, abs=1e-7)


def test_interpolation_is_exact_for_polynomials():
    grid = Chebyshev(-1.0, 3.0, 8)
    at = np.array([-1.0, 0.3, 2.9, grid.points[3]])
    assert grid.rows(at) @ grid.points**7 == pytest.approx(at**7)


def test_the_signal_at_the_minimum_is_the_mutual_information():
    problem = Bernoulli(sensitivity=1.0)
    minimum = np.array([math.log(0.6 / 0.4)])
    assert problem.gradient(minimum).mean == pytest.approx(0, abs=1e-12)
    assert problem.multiplier(minimum, "state").mean == pytest.approx(math.exp(problem.information))


def test_information_from_the_gradients_own_batch_moves_the_fixed_point():
    """A batch of one: E[rho g] = 0 where s is the mean of the teachers with weights exp(-alpha h)."""
    problem = Bernoulli(batch=1, rho_max=10.0)
    t = np.array(problem.teachers)
    weight = np.exp(-binary_entropy(t))
    s = (weight @ t) / weight.sum()
    theta = np.array([math.log(s / (1 - s))])
    assert problem.product(theta, "shared").mean == pytest.approx(0, abs=1e-12)
    assert abs(problem.product(theta, "state").mean.item()) > 0.01


def test_orders_with_a_random_multiplier():
    problem, etas = Bernoulli(), [0.2, 0.1, 0.05]

    def errors(kind, signal, function="mean"):
        exact = [problem.discrete(signal, eta, round(4 / eta))[function] for eta in etas]
        return [problem.sde(kind, signal, eta, 4.0)[function] - e for eta, e in zip(etas, exact, strict=True)]

    assert fit_order(etas, errors("paper", "state")).value == pytest.approx(1, abs=0.03)
    assert fit_order(etas, errors("matched", "shared")).value == pytest.approx(1, abs=0.03)
    assert fit_order(etas, errors("order-2 drift", "shared")).value == pytest.approx(2, abs=0.05)
    assert fit_order(etas, errors("scaled", "state", "variance")).value == pytest.approx(2, abs=0.05)
    # No order at all: what is left at eta 0 is most of what is there at 0.05.
    large, small = errors("paper", "shared")[1:]
    assert 2 * small - large == pytest.approx(small, rel=0.15)


# ------------------------------------------------------------------------------------------------ multiplier and Adam


@pytest.mark.parametrize(
    ("mean", "deviation", "alpha", "low", "high"),
    [
        (0.07, 0.1, 1.5, 1.0, 2.0),
        (0.0, 0.5, 2.0, 0.0, 3.0),
        (0.1, 0.3, 1.0, 0.0, math.inf),
        (-1.0, 0.02, 1.0, 1.0, 2.0),
    ],
)
def test_the_law_of_the_multiplier_is_that_of_an_integral(mean, deviation, alpha, low, high):
    z = np.linspace(-12, 12, 400_001)
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    rho = np.clip(np.exp(alpha * (mean + deviation * z)), low, high)
    law = multiplier_law(mean, deviation, alpha, low, high)
    assert law.mean == pytest.approx(weight @ rho, rel=1e-6)
    assert law.variance == pytest.approx(weight @ (rho - weight @ rho) ** 2, rel=1e-4, abs=1e-12)
    if math.isfinite(high):
        assert law.variance <= variance_bound(deviation, alpha, high)


def test_without_a_bound_on_rho_the_bound_on_its_variance_does_not_hold():
    assert multiplier_law(0.0, 2.0, 1.0, 0.0, math.inf).variance > variance_bound(2.0, 1.0, 2.0)


def test_what_adam_makes_of_a_multiplier():
    problem = Quadratic()
    run = lambda rule, rho: simulate(problem, rule, rho, 0.05, 2500, 150, seed=0)  # noqa: E731
    sgd = run("SGD, update", 2.0)
    assert sgd.low - 0.002 < problem.discrete_stationary(2.0, 0.05) < sgd.high + 0.002
    assert run("SGD, loss", 2.0).value == pytest.approx(sgd.value, rel=1e-9)
    one, update, loss = run("Adam, update", 1.0), run("Adam, update", 2.0), run("Adam, loss", 2.0)
    assert loss.value == pytest.approx(one.value, rel=1e-5)  # but for Adam's epsilon
    assert update.value / one.value == pytest.approx(2, abs=0.15)


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_report(tmp_path, capsys):
    words = ["--etas", "[0.2, 0.1, 0.05]", "--steps", "40", "--chains", "8", "--output", str(tmp_path / "out")]
    run(sde, [*words])
    told = capsys.readouterr().out
    assert "order in the mean is 1.0" in told
    assert "in the mean is -0.037 at eta 0" in told
    content = json.loads((tmp_path / "out" / "sde.json").read_text())
    assert content["quadratic"]["paper"]["mean"]["order"]["value"] == pytest.approx(1, abs=0.1)
    assert content["stationary"][2]["paper_ratio"] == pytest.approx(4.21, abs=0.01)
    report = (tmp_path / "out" / "sde.md").read_text()
    assert "| 2 | 0.0526 | 0.0125 (4.21) | 0.0500 (1.05) | 0.0132 | 0.0526 |" in report
    assert (tmp_path / "out" / "sde.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sde.md", "sde.json", "sde.png"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"etas": [0.1, 0.2]}, "`etas` to be at least three"),
        ({"etas": [0.2, 0.1, 0.05, 0.05]}, "`etas` to be at least three different step sizes, each once"),
        ({"etas": [0.3, 0.2, 0.1]}, "`etas` to divide `horizon`"),
        ({"horizon": math.inf}, "`horizon` to be above 0 and finite"),
        ({"information": math.nan}, "`information` to be finite"),
        ({"deviations": []}, "`deviations` not to be empty"),
        ({"sensitivities": []}, "`sensitivities` not to be empty"),
        (lambda: {"bernoulli": Bernoulli(rho_min=3.0)}, "`bernoulli.rho_min` to be at most `bernoulli.rho_max`"),
        ({"etas": [0.1, 0.05, -0.1]}, r"`etas\[2\]` to be above 0"),
        ({"rhos": []}, "`rhos` not to be empty"),
        ({"rhos": [1.0, 30.0]}, "`etas` and `stationary_eta` to be below"),
        ({"rho_max": 0.5}, r"`rho_max` to lie in \[1, 1000\]"),
        ({"chains": 1}, "`chains` to be at least 2"),
        (lambda: {"quadratic": Quadratic(noise=0.0)}, "`quadratic.noise` to be above 0"),
        (lambda: {"bernoulli": Bernoulli(teachers=(0.5, 1.0))}, "`bernoulli.teachers` to lie between"),
        (lambda: {"bernoulli": Bernoulli(batch=33)}, r"`bernoulli.batch` to lie in \[1, 32\]"),
        (lambda: {"bernoulli": Bernoulli(rho_max=50.0)}, "times `bernoulli.rho_max` to be at most 4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        sde(output=str(tmp_path / "out"), **(settings() if callable(settings) else settings))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Quadratic, "discrete", None)
    with pytest.raises(FileExistsError, match="`output` to be a folder"):
        sde(output=str(tmp_path / "file"))


def test_a_setting_that_makes_no_sense_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: Expected `chains` to be at least 2"):
        run(sde, ["--chains", "1", "--output", str(tmp_path / "out")])


def test_nothing_is_left_of_a_study_that_cannot_be_drawn(tmp_path):
    def draw(file):
        file.write(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_note(tmp_path, "sde", "words", {}, draw)
    assert {path.name for path in tmp_path.iterdir()} == {"sde.md", "sde.json"}
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="`output` to be a folder"):
        write_note(tmp_path / "file", "sde", "words", {}, draw)
