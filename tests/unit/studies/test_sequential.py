"""Levels of group-sequential looks, against published bounds, and their error rate on simulated studies."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student_t

from pgpo_lightning.studies.sequential import SequentialPlan, levels, spent
from tests.support.inference import noise

LOOKS = (5, 10, 15, 20, 30)


@pytest.mark.parametrize(
    ("spending", "bounds"),
    [  # Lan-DeMets bounds of five equal looks, one-sided 0.025, as printed by rpact, gsDesign and East
        ("obrien-fleming", (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
        ("pocock", (2.4380, 2.4268, 2.4101, 2.3966, 2.3859)),
    ],
)
def test_bounds_are_the_published_ones(spending, bounds):
    assert norm.isf(levels((1, 2, 3, 4, 5), spending)) == pytest.approx(bounds, abs=2e-4)


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock"])
@pytest.mark.parametrize("alpha", [0.025, 0.025 / 3])
def test_the_error_rate_of_all_looks_is_that_of_one(spending, alpha):
    rng, studies, looks = np.random.default_rng(0), 40_000, np.array(LOOKS)
    draws = rng.normal(size=(studies, 30))
    bounds = norm.isf(levels(LOOKS, spending, alpha))
    z = draws.cumsum(axis=1)[:, looks - 1] / np.sqrt(looks)
    assert (z > bounds).any(axis=1).mean() == pytest.approx(alpha, abs=noise(alpha, studies))
    # Of t statistics with few seeds: 0.0256 and 0.0267 in place of 0.025 in four million studies.
    p = [student_t.sf(np.sqrt(n) * draws[:, :n].mean(1) / draws[:, :n].std(1, ddof=1), n - 1) for n in LOOKS]
    found = (np.array(levels(LOOKS, spending, alpha)) >= np.array(p).T).any(axis=1).mean()
    assert found == pytest.approx(alpha, abs=noise(alpha, studies) + 0.08 * alpha)


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock"])
def test_what_is_spent_rises_to_the_whole_error_rate(spending):
    each = [spent(look / 30, spending, 0.025) for look in LOOKS]
    assert each == sorted(each)
    assert each[-1] == pytest.approx(0.025)
    assert levels((30,), spending) == pytest.approx((0.025,))


def test_between_looks_nothing_is_concluded():
    plan = SequentialPlan(LOOKS)
    assert [plan.level(seeds, 0.025) > 0 for seeds in (4, 5, 6, 10, 29, 30)] == [False, True, False, True, False, True]
    assert plan.level(40, 0.025) == plan.level(30, 0.025)
    assert [plan.next_look(seeds) for seeds in (0, 5, 29, 30)] == [5, 10, 30, None]


@pytest.mark.parametrize("looks", [(5, 5), (10, 5), (1, 5)])
def test_looks_that_do_not_rise_are_refused(looks):
    with pytest.raises(ValueError, match=r"`looks` to be rising numbers of seeds from 2 on, but got \["):
        SequentialPlan(looks)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"looks": ()}, "`looks`"),
        ({"looks": (5, 10), "spending": "haybittle"}, "`spending` to be one of obrien-fleming"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SequentialPlan(**setting)
