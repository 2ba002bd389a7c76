"""The statistics of a report, against tables and definitions."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from pgpo_lightning.studies.inference import (
    Mean,
    exact_interval,
    holm,
    pigeonhole,
    two_way,
)
from pgpo_lightning.studies.sample_size import seeds_for
from tests.support.inference import noise, tables


@pytest.mark.parametrize(
    ("p", "freedom", "t"),
    [
        (0.05, 1, 12.7062),
        (0.05, 2, 4.30265),
        (0.05, 9, 2.26216),
        (0.01, 9, 3.24984),
        (0.05, 30, 2.04227),
        (0.001, 1, 636.619),
    ],
)
def test_interval_and_p_agree_with_printed_tables_of_students_t(p, freedom, t):
    mean = Mean(value=t, seed_variance=1, question_variance=0, cell_variance=0, seeds=freedom + 1, questions=1)
    assert mean.interval(1 - p) == pytest.approx((0, 2 * t), rel=1e-5, abs=1e-5 * t)
    assert mean.p() == pytest.approx(p, rel=1e-4)


def test_far_out_students_t_is_the_normal_and_exact_for_two_degrees():
    assert Mean(0, 1, 0, 0, 10**6 + 1, 1).interval()[1] == pytest.approx(1.959964, abs=1e-5)
    assert Mean(0, 1, 0, 0, 6, 1).p() == 1
    for t in (0.1, 1.0, 3.0, 30.0):  # closed form at two degrees of freedom
        assert Mean(t, 1, 0, 0, 3, 1).p() == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("count", "of"), [(0, 10), (3, 24), (5, 10), (10, 10), (105, 105), (162, 195)])
def test_an_exact_interval_ends_where_the_count_becomes_too_unlikely(count, of):
    def likely(counts, p):
        return sum(math.comb(of, k) * p**k * (1 - p) ** (of - k) for k in counts)

    low, high = exact_interval(count, of)
    assert (low == 0) == (count == 0)
    assert (high == 1) == (count == of)
    if count:
        assert likely(range(count, of + 1), low) == pytest.approx(0.025, rel=1e-6)
    if count < of:
        assert likely(range(count + 1), high) == pytest.approx(0.025, rel=1e-6)


def test_the_variance_is_that_of_the_mean_squares():
    table = np.random.default_rng(0).normal(size=(4, 7)) + np.arange(7)
    mean = two_way(table)
    seeds, questions = table.shape
    rows, columns, grand = table.mean(axis=1), table.mean(axis=0), table.mean()
    squares_seeds = questions * sum((row - grand) ** 2 for row in rows) / (seeds - 1)
    squares_questions = seeds * sum((column - grand) ** 2 for column in columns) / (questions - 1)
    rest = sum((table[s, q] - rows[s] - columns[q] + grand) ** 2 for s in range(seeds) for q in range(questions))
    squares_rest = rest / ((seeds - 1) * (questions - 1))
    variance = (squares_seeds + squares_questions - squares_rest) / table.size
    assert mean.value == pytest.approx(grand)
    assert mean.error == pytest.approx(math.sqrt(variance))
    parts = [
        (squares_seeds, seeds - 1),
        (squares_questions, questions - 1),
        (squares_rest, (seeds - 1) * (questions - 1)),
    ]
    freedom = (variance * table.size) ** 2 / sum(square**2 / df for square, df in parts)
    assert mean.freedom == pytest.approx(max(3, freedom))
    low, high = mean.interval()
    assert (
        high - mean.value
        == pytest.approx(mean.value - low)
        == pytest.approx(student_t.isf(0.025, mean.freedom) * mean.error)
    )
    assert 2 * student_t.sf(abs(mean.value) / mean.error, mean.freedom) == mean.p()


def test_without_questions_it_is_the_t_interval_of_the_seeds():
    values = np.array([[0.1], [0.4], [0.3]])
    mean = two_way(values)
    assert mean.error == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert mean.freedom == 2
    assert mean.deviation == pytest.approx(values.std(ddof=1))


def test_a_single_seed_has_a_value_and_nothing_else():
    mean = two_way(np.array([[0.0, 1.0, 1.0]]))
    assert mean.value == pytest.approx(2 / 3)
    assert all(map(math.isnan, (*mean.interval(), mean.p(), mean.error, *pigeonhole(np.ones((1, 3))))))


def test_equal_runs_differ_by_exactly_nothing():
    mean = two_way(np.zeros((5, 10)))
    assert (*mean.interval(), mean.p()) == (0, 0, 1)
    assert two_way(np.full((5, 10), 0.5)).p() == 0
    assert seeds_for(mean, 0.02) == 2


def test_seeds_that_agree_by_chance_do_not_make_the_error_vanish():
    table = np.array([[0.125, 0.0, 0.0, -0.125], [0.0, 0.125, -0.125, 0.0]])
    mean = two_way(table)
    assert mean.seed_variance == 0
    assert mean.error == math.sqrt(mean.cell_variance) > 0


@pytest.mark.parametrize("seeds", [3, 5, 20])
@pytest.mark.parametrize("of_seed", [0.01, 0.05])
def test_intervals_cover_the_truth_with_few_seeds_and_many(seeds, of_seed):
    drawn = tables(np.random.default_rng(seeds), seeds, mean=0.01, of_seed=of_seed)
    covered = [low <= 0.01 <= high for low, high in (two_way(table).interval() for table in drawn)]
    assert np.mean(covered) == pytest.approx(0.95, abs=noise(0.95))


def test_the_bootstrap_spreads_as_owen_says():
    table = tables(np.random.default_rng(3), 200, 200, n=1)[0]
    low, high = pigeonhole(table, draws=4000)
    mean = two_way(table)
    # Its variance counts the cells three times instead of once; of so many cells that is little.
    variance = mean.error**2 + 2 * mean.cell_variance
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.06)
    assert pigeonhole(table, 100, seed=1) == pigeonhole(table, 100, seed=1) != pigeonhole(table, 100, seed=2)


@pytest.mark.parametrize("seeds", [4, 10])
def test_equivalence_is_two_one_sided_tests(seeds):
    rng = np.random.default_rng(seeds)
    mean = two_way(tables(rng, seeds, n=1)[0])
    for margin in (0.01, 0.05, 0.1):
        low, high = mean.interval(0.95)
        assert (mean.p_within(margin) < 0.025) == (-margin < low and high < margin)
        assert mean.p_above() + mean.p_below(0.0) == pytest.approx(1)
    assert mean.p() == pytest.approx(2 * min(mean.p_above(), mean.p_below(0.0)))


def test_equivalence_and_holm_are_those_of_statsmodels():
    statsmodels = pytest.importorskip("statsmodels.stats.weightstats", reason="statsmodels is not installed")
    from statsmodels.stats.multitest import multipletests

    values = np.random.default_rng(0).normal(0.3, 1, size=(12, 1))
    mean = two_way(values)
    p, (_, above, _), (_, below, _) = statsmodels.DescrStatsW(values[:, 0]).ttost_mean(-0.9, 0.9)
    assert mean.p_within(0.9) == pytest.approx(p)
    assert (mean.p_above(-0.9), mean.p_below(0.9)) == pytest.approx((above, below))
    found = [0.01, 0.04, 0.03, 0.5]
    assert holm(found) == pytest.approx(multipletests(found, method="holm")[1])


def test_the_standard_error_is_that_of_a_mixed_model_with_crossed_effects():
    """REML of a balanced table has the variance components of the mean squares, where none is negative."""
    api = pytest.importorskip("statsmodels.formula.api", reason="statsmodels is not installed")
    import pandas as pd

    table = tables(np.random.default_rng(1), 8, questions=12, mean=0.05, of_seed=0.1, of_question=0.15, n=1)[0]
    seeds, questions = np.indices(table.shape)
    frame = pd.DataFrame({"d": table.ravel(), "seed": seeds.ravel(), "question": questions.ravel(), "all": 1})
    effects = {"seed": "0 + C(seed)", "question": "0 + C(question)"}
    model = api.mixedlm("d ~ 1", frame, groups="all", re_formula="0", vc_formula=effects)
    fit = model.fit(reml=True, method="lbfgs")
    mean = two_way(table)
    assert mean.value == pytest.approx(float(fit.params["Intercept"]), abs=1e-6)
    assert mean.error == pytest.approx(float(fit.bse["Intercept"]), rel=1e-4)


def test_identical_runs_have_no_one_sided_p_value():
    assert all(map(math.isnan, (two_way(np.zeros((5, 10))).p_above(), two_way(np.zeros((5, 10))).p_within(0.02))))
    assert math.isnan(two_way(np.ones((1, 3))).p_below(2.0))
