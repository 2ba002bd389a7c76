"""The statistics of a report, against tables and definitions."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from pgpo_lightning.studies.inference import (
    Mean,
    answer,
    exact_interval,
    holm,
    pigeonhole,
    questions_for,
    seeds_for,
    two_way,
    wilson_interval,
)
from pgpo_lightning.studies.simulation import World, measure
from tests.support.inference import STUDIES, noise


def tables(rng, seeds, questions=100, mean=0.0, of_seed=0.03, of_question=0.08, of_cell=0.2, n=STUDIES):
    """Paired differences with crossed effects, each table of shape (seeds, questions)."""
    shape = (n, seeds, questions)
    effects = rng.normal(0, of_seed, shape[:2])[:, :, None] + rng.normal(0, of_question, (n, 1, questions))
    return mean + effects + rng.normal(0, of_cell, shape)


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


def test_share_against_a_published_value():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


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
    mean = two_way([table])
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
    mean = two_way([values])
    assert mean.error == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert mean.freedom == 2
    assert mean.deviation == pytest.approx(values.std(ddof=1))


def test_a_single_seed_has_a_value_and_nothing_else():
    mean = two_way([np.array([[0.0, 1.0, 1.0]])])
    assert mean.value == pytest.approx(2 / 3)
    assert all(map(math.isnan, (*mean.interval(), mean.p(), mean.error, *pigeonhole(np.ones((1, 3))))))


def test_equal_runs_differ_by_exactly_nothing():
    mean = two_way([np.zeros((5, 10))])
    assert (*mean.interval(), mean.p()) == (0, 0, 1)
    assert two_way([np.full((5, 10), 0.5)]).p() == 0
    assert seeds_for(mean, 0.02) == 2


def test_seeds_that_agree_by_chance_do_not_make_the_error_vanish():
    table = np.array([[0.125, 0.0, 0.0, -0.125], [0.0, 0.125, -0.125, 0.0]])
    mean = two_way([table])
    assert mean.seed_variance == 0
    assert mean.error == math.sqrt(mean.cell_variance) > 0


def test_studies_are_pooled_on_their_shared_seeds_and_questions():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    assert two_way([one, two]) == two_way([(one + two) / 2])
    assert two_way([one, one]) == two_way([one])  # the same study again is no new evidence
    other = rng.normal(size=(6, 5))
    pooled = two_way([one, other])
    assert pooled.value == pytest.approx((one.mean() + other.mean()) / 2)
    by_seed = (one.mean(axis=1) + other.mean(axis=1)) / 2
    assert pooled.seed_variance == pytest.approx(by_seed.var(ddof=1) / 6)


def test_a_pool_of_studies_with_other_questions_covers():
    rng = np.random.default_rng(2)
    pairs = zip(tables(rng, 10, 60), tables(rng, 10, 30), strict=True)
    covered = [low <= 0 <= high for low, high in (two_way(list(pair)).interval() for pair in pairs)]
    assert np.mean(covered) == pytest.approx(0.95, abs=noise(0.95))


@pytest.mark.parametrize("seeds", [3, 5, 20])
@pytest.mark.parametrize("of_seed", [0.01, 0.05])
def test_intervals_cover_the_truth_with_few_seeds_and_many(seeds, of_seed):
    drawn = tables(np.random.default_rng(seeds), seeds, mean=0.01, of_seed=of_seed)
    covered = [low <= 0.01 <= high for low, high in (two_way([table]).interval() for table in drawn)]
    assert np.mean(covered) == pytest.approx(0.95, abs=noise(0.95))


def test_the_bootstrap_spreads_as_owen_says():
    table = tables(np.random.default_rng(3), 200, 200, n=1)[0]
    low, high = pigeonhole(table, draws=4000)
    mean = two_way([table])
    # Its variance counts the cells three times instead of once; of so many cells that is little.
    variance = mean.error**2 + 2 * mean.cell_variance
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.06)
    assert pigeonhole(table, 100, seed=1) == pigeonhole(table, 100, seed=1) != pigeonhole(table, 100, seed=2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.3, "yes"),
        (0.001, 0.01, "yes"),
        (-0.01, 0.019, "no"),
        (-0.3, -0.1, "no"),
        (-0.3, 0.01, "no"),
        (-0.01, 0.02, "not resolved"),
        (0.0, 0.1, "not resolved"),
        (math.nan, math.nan, "not resolved"),
    ],
)
def test_the_answer_follows_from_the_interval(low, high, expected):
    assert answer(low, high, 0.02) == expected


def test_the_seeds_asked_for_give_the_power_promised():
    rng = np.random.default_rng(4)
    spread = {"of_seed": 0.04, "of_question": 0.05}
    needed = seeds_for(two_way([tables(rng, 200, n=1, **spread)[0]]), 0.02)
    intervals = [two_way([table]).interval() for table in tables(rng, needed, **spread)]
    answers = [answer(low, high, 0.02) for low, high in intervals]
    assert answers.count("no") / STUDIES == pytest.approx(0.8, abs=noise(0.8) + 0.03)  # 0.03: the 200 seeds' own error
    assert answers.count("yes") / STUDIES <= 0.025 + noise(0.025)
    # With a true gain of the margin it is the other way round.
    answers = [answer(low + 0.02, high + 0.02, 0.02) for low, high in intervals]
    assert answers.count("yes") / STUDIES == pytest.approx(0.8, abs=noise(0.8) + 0.03)
    assert answers.count("no") / STUDIES <= 0.025 + noise(0.025)


def test_where_the_questions_are_the_limit_it_asks_for_questions():
    mean = two_way([tables(np.random.default_rng(5), 10, of_question=0.3, n=1)[0]])
    assert seeds_for(mean, 0.02) is None
    more = questions_for(mean, 0.02)
    assert more > mean.questions
    # Its own definition: with so many questions and no spread between seeds the distance is just reached.
    spread = math.sqrt((mean.question_variance - mean.cell_variance) * mean.questions / more)
    assert (1.95996 + 0.84162) * spread == pytest.approx(0.02, rel=0.01)


def test_collapsing_runs_are_covered_where_the_bootstrap_is_not():
    found = measure(0.02, World(collapse=0.2), 100, seed=1, draws=300)
    assert found["covered"] >= 0.95 - noise(0.95, 100)
    assert found["bootstrap_covered"] < found["covered"]
