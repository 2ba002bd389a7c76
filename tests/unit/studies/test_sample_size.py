"""Sample sizes: the power they promise, and the range that an estimated variance leaves open."""

import math

import numpy as np
import pytest

from pgpo_lightning.studies.inference import two_way
from pgpo_lightning.studies.sample_size import needs, questions_for, seeds_for, seeds_range
from tests.support.inference import STUDIES, noise, tables


def test_the_seeds_asked_for_give_the_power_promised():
    rng = np.random.default_rng(4)
    spread = {"of_seed": 0.04, "of_question": 0.05}
    needed = seeds_for(two_way(tables(rng, 200, n=1, **spread)[0]), 0.02)
    means = [two_way(table) for table in tables(rng, needed, **spread)]
    no, yes = np.array([[mean.p_below(0.02), mean.p_above()] for mean in means]).T < 0.025
    assert np.mean(no) == pytest.approx(0.8, abs=noise(0.8) + 0.03)  # 0.03: the 200 seeds' own error
    assert np.mean(yes) <= 0.025 + noise(0.025)
    # With a true gain of the margin it is the other way round.
    no, yes = np.array([[mean.p_below(0.0), mean.p_above(-0.02)] for mean in means]).T < 0.025
    assert np.mean(yes) == pytest.approx(0.8, abs=noise(0.8) + 0.03)
    assert np.mean(no) <= 0.025 + noise(0.025)


def test_where_the_questions_are_the_limit_it_asks_for_questions():
    mean = two_way(tables(np.random.default_rng(5), 10, of_question=0.3, n=1)[0])
    assert seeds_for(mean, 0.02) is None
    more = questions_for(mean, 0.02)
    assert more > mean.questions
    # Its own definition: with so many questions and no spread between seeds the distance is just reached.
    spread = math.sqrt((mean.question_variance - mean.cell_variance) * mean.questions / more)
    assert (1.95996 + 0.84162) * spread == pytest.approx(0.02, rel=0.01)


def test_the_range_contains_the_number_that_is_needed_in_nine_of_ten_studies():
    rng = np.random.default_rng(6)
    needed = seeds_for(two_way(rng.normal(0, 0.05, (100_000, 1))), 0.02)
    limits = [seeds_range(two_way(rng.normal(0, 0.05, (8, 1))), 0.02) for _ in range(STUDIES)]
    assert np.mean([low <= needed <= high for low, high in limits]) == pytest.approx(0.9, abs=noise(0.9))
    assert np.mean([high < needed for _, high in limits]) == pytest.approx(0.05, abs=noise(0.05))


def test_few_seeds_have_no_sample_size():
    rng = np.random.default_rng(7)
    assert seeds_range(two_way(rng.normal(0, 0.05, (4, 1))), 0.02) is None
    assert set(needs(two_way(rng.normal(0, 0.05, (4, 1))), 0.02, 0.95).values()) == {None}
    assert set(needs(two_way(np.zeros((6, 4))), 0.02, 0.95).values()) == {None}
    low, high = needs(two_way(rng.normal(0, 0.05, (5, 1))), 0.02, 0.95)["seeds_needed"]
    assert low < high


def test_there_are_never_fewer_seeds_needed_than_there_are():
    # Much is known and the difference lies in between: neither 0 nor the margin is excluded.
    mean = two_way(0.01 + 0.02 * np.tile([[-1.0], [1.0]], (8, 1)))
    found = needs(mean, 0.02, 0.95)
    assert found["seeds_needed"] == found["seeds_if_seen"]
    assert found["seeds_needed"][1] > 16


def test_where_questions_are_the_limit_their_number_is_given():
    mean = two_way(tables(np.random.default_rng(5), 10, of_question=0.3, n=1)[0])
    found = needs(mean, 0.02, 0.95)
    assert found["questions_needed"] == questions_for(mean, 0.02)
    assert found["seeds_needed"] is None
