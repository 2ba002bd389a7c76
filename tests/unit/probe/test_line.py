"""The line from gaps to gains: closed forms and published points."""

import numpy as np
import pytest
from scipy.stats import linregress
from scipy.stats import t as student_t

from pgpo_lightning.probe.line import fit, lines, reliability

PUBLISHED = {  # read off the figures of arXiv 2605.30070; slope (the paper's: 1.492, .663, 1.508), LOO RMSE, LOO R2 and R2
    "Qwen3-8B": (
        [(-0.004, 0.004), (0.006, -0.012), (0.0275, 0.027), (0.0535, 0.106), (0.0725, 0.0935), (0.137, 0.2005)],
        (1.499, 0.0215, 0.913, 0.950),
    ),
    "Olmo-3-7B": ([(-0.001, 0), (0.0555, 0.045), (0.174, 0.1175)], (0.662, 0.0146, 0.909, 0.995)),
    "scale": ([(0.058, 0.071), (0.103, 0.142), (0.1355, 0.177), (0.1375, 0.2005)], (1.500, 0.0134, 0.925, 0.977)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lines_of_the_published_points(name):
    given, (slope, rmse, loo_r2, r2) = PUBLISHED[name]
    line = fit(*np.array(given).T)
    assert line.slope == pytest.approx(slope, abs=5e-4)
    assert line.loo_rmse == pytest.approx(rmse, abs=5e-5)
    assert line.loo_r2 == pytest.approx(loo_r2, abs=5e-4)
    assert line.r2 == pytest.approx(r2, abs=5e-4)


def test_one_published_point_carries_the_fit():
    line = fit(*np.array(PUBLISHED["Qwen3-8B"][0]).T)
    assert line.leverage.max() == pytest.approx(0.75, abs=5e-3)
    assert line.leverage.sum() == pytest.approx(2)
    assert line.scatter == pytest.approx(0.020, abs=5e-4)
    value, half = line.predict(0.05)
    assert half == pytest.approx(0.06, abs=1e-3)
    assert value == pytest.approx(line.intercept + 0.05 * line.slope)


def test_left_out_errors_are_those_of_refits():
    g, d = np.array(PUBLISHED["Qwen3-8B"][0]).T
    line = fit(g, d)
    for i in range(len(g)):
        others = np.arange(len(g)) != i
        again = fit(g[others], d[others])
        assert line.left_out[i] == pytest.approx(d[i] - again.intercept - again.slope * g[i])
    assert line.loo_constant == pytest.approx(
        np.sqrt(np.mean([(d[i] - np.delete(d, i).mean()) ** 2 for i in range(6)]))
    )


def test_the_prediction_interval_is_the_textbook_one():
    g, d = np.array(PUBLISHED["scale"][0]).T
    x = np.column_stack([np.ones(4), g])
    residuals = d - x @ np.linalg.lstsq(x, d, rcond=None)[0]
    new = np.array([1, 0.1])
    half = student_t.isf(0.025, 2) * np.sqrt(residuals @ residuals / 2 * (1 + new @ np.linalg.inv(x.T @ x) @ new))
    assert fit(g, d).predict(0.1)[1] == pytest.approx(half)


def test_the_interval_covers_new_configurations():
    rng = np.random.default_rng(1)
    g, hits = np.array([0.0, 0.02, 0.05, 0.1, 0.12]), 0
    for _ in range(2000):
        line = fit(g, 0.01 + 1.5 * g + 0.02 * rng.standard_normal(5))
        value, half = line.predict(0.07)
        hits += abs(0.01 + 1.5 * 0.07 + 0.02 * rng.standard_normal() - value) < half
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("outside", [-0.01, 0.14])
def test_no_silent_extrapolation(outside):
    line = fit(*np.array(PUBLISHED["Qwen3-8B"][0]).T)
    with pytest.raises(ValueError, match="calibrated range"):
        line.predict(outside)
    assert line.predict(outside, extrapolate=True)[1] > line.predict(0.05)[1]


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="at least 3 configurations"):
        fit(np.array([0.0, 0.1]), np.array([0.0, 0.1]))
    with pytest.raises(ValueError, match="at least 3 different gaps"):
        fit(np.array([0.0, 0.1, 0.1]), np.array([0.0, 0.1, 0.2]))


def test_many_lines_at_once_are_single_ones():
    rng = np.random.default_rng(0)
    g, d = rng.random((3, 5)), rng.random((3, 5))
    intercepts, slopes = lines(g, d)
    assert slopes[1] == pytest.approx(fit(g[1], d[1]).slope)
    assert intercepts[2] == pytest.approx(fit(g[2], d[2]).intercept)
    assert reliability(np.array([0.0, 0.1, 0.2]), 0.05**2) == pytest.approx(0.75)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_are_those_of_least_squares(level):
    g, d = np.array(PUBLISHED["Qwen3-8B"][0]).T
    expected, half = linregress(g, d), student_t.isf((1 - level) / 2, len(g) - 2)
    intercept, slope = fit(g, d).intervals(level)
    assert slope == pytest.approx((expected.slope - half * expected.stderr, expected.slope + half * expected.stderr))
    away = half * expected.intercept_stderr
    assert intercept == pytest.approx((expected.intercept - away, expected.intercept + away))
