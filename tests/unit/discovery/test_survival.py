"""discovery@k against hand-worked numbers, statsmodels, and simulated runs whose distribution is known."""

import numpy as np
import pytest

from pgpo_lightning.discovery.survival import Resamples, interval, kaplan_meier

TIMES = np.array([2.0, 3.0, 3.0, 5.0, 8.0])
FOUND = np.array([True, True, False, True, False])


def test_hand_worked_survival():
    curve = kaplan_meier(TIMES, FOUND)
    # Of 5 at risk one at 2, of 4 one at 3 (the run that ends at 3 is still at risk), of 2 one at 5.
    survival = {1.9: 1.0, 2.0: 4 / 5, 3.0: 4 / 5 * 3 / 4, 5.0: 4 / 5 * 3 / 4 / 2, 100.0: 0.3}
    for at, value in survival.items():
        assert 1 - curve.discovery(at)[0] == pytest.approx(value)
    # 2 x 1 + 1 x .8 + 2 x .6 + 1 x .3
    assert curve.restricted_mean(6)[0] == pytest.approx(4.3)
    assert curve.restricted_mean(2.5)[0] == pytest.approx(2 + 0.5 * 0.8)
    assert curve.median()[0] == 5
    assert kaplan_meier(TIMES, np.zeros(5, dtype=bool)).median()[0] == np.inf


def test_without_censoring_it_is_the_share_of_runs():
    curve = kaplan_meier(np.array([1.0, 1.0, 4.0, 7.0]), np.ones(4, dtype=bool))
    np.testing.assert_allclose(curve.discovery(np.array([0.0, 1.0, 3.0, 4.0, 7.0]))[0], [0, 0.5, 0.5, 0.75, 1])


def test_weights_are_repeated_runs():
    weights = np.array([[2.0, 0, 1, 3, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    curve = kaplan_meier(TIMES, FOUND, weights)
    copies = np.repeat(np.arange(5), weights[0].astype(int))
    alone = kaplan_meier(TIMES[copies], FOUND[copies])
    at = np.array([1.0, 2.0, 3.0, 5.0, 9.0])
    np.testing.assert_allclose(curve.discovery(at)[0], alone.discovery(at)[0])
    np.testing.assert_allclose(curve.discovery(at)[1], kaplan_meier(TIMES, FOUND).discovery(at)[0])
    assert np.isnan(curve.discovery(at[1:])[2]).all(), "a resample without runs says nothing"


def test_it_is_that_of_statsmodels():
    survfunc = pytest.importorskip("statsmodels.duration.survfunc", reason="statsmodels is not installed")
    rng = np.random.default_rng(0)
    times, found = rng.integers(1, 12, 60).astype(float), rng.random(60) < 0.6
    theirs = survfunc.SurvfuncRight(times, found.astype(int))
    np.testing.assert_allclose(1 - kaplan_meier(times, found).discovery(theirs.surv_times)[0], theirs.surv_prob)


def test_known_truth_under_censoring():
    """Geometric discovery times, and runs of random length: the share of successes alone would be far off."""
    rng = np.random.default_rng(1)
    p, runs = 0.05, 20_000
    times, ends = rng.geometric(p, runs), rng.integers(1, 80, runs)
    found = times <= ends
    curve = kaplan_meier(np.minimum(times, ends).astype(float), found)
    for k in (1, 10, 40):
        assert curve.discovery(float(k))[0] == pytest.approx(1 - (1 - p) ** k, abs=0.015)
    assert curve.restricted_mean(40)[0] == pytest.approx((1 - (1 - p) ** 40) / p, rel=0.02)
    assert abs(found.mean() - (1 - (1 - p) ** 80)) > 0.2


def test_the_interval_covers_what_varies_between_questions():
    """Questions differ, so an interval that takes runs for independent would be too narrow by a factor of 2."""
    rng, covered, widths = np.random.default_rng(2), 0, []
    questions, seeds = np.repeat(np.arange(20), 5), np.tile(np.arange(5), 20)
    weights = Resamples(range(20), range(5), 400).weights(questions, seeds)
    for _ in range(100):
        solved = rng.beta(0.5, 0.5, 20)[questions]  # discovery@1 of each question; mean 1/2
        found = rng.random(100) < solved
        low, high = interval(kaplan_meier(np.ones(100), found, weights).discovery(1.0))
        covered += low <= 0.5 <= high
        widths.append(high - low)
    assert covered >= 85
    assert np.mean(widths) > 1.4 * 2 * 1.96 * 0.5 / 10


def test_methods_share_their_resamples():
    resamples = Resamples([3, 7], [0, 1, 2], 50)
    first = resamples.weights([3, 3, 7], [0, 1, 2])
    np.testing.assert_array_equal(first[:, [2, 0]], resamples.weights([7, 3], [2, 0]))
    every = resamples.weights([3, 3, 3, 7, 7, 7], [0, 1, 2] * 2)
    assert set(every.sum(axis=1)) == {6.0}
