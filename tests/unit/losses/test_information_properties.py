"""The information of a step does not depend on the order of its rows, the names of its questions or rows without a teacher."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics

FIELDS = [f.name for f in fields(StepStatistics)]
ESTIMATORS = ["entropy-difference", "kl", "log-ratio"]
AGGREGATIONS = ["sequence-mean", "token-mean", "sequence-sum"]


@st.composite
def steps(draw):
    n, generator = draw(st.integers(1, 12)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    columns = dict(zip(FIELDS, 2 * torch.randn(len(FIELDS), n, generator=generator), strict=True))
    for name, low, high in (("length", 1, 30), ("question", 0, 5), ("has_teacher", 0, 2)):
        columns[name] = torch.randint(low, high, (n,), generator=generator).float()
    return StepStatistics(**columns)


def rows(statistics, chosen):
    return StepStatistics.from_table(statistics.table()[chosen])


def assert_same(a, b):
    assert a.value == pytest.approx(b.value, rel=1e-9, abs=1e-9)
    assert a.standard_error == pytest.approx(b.standard_error, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(statistics=steps(), data=st.data())
def test_the_order_of_the_rows_does_not_matter(estimator, aggregation, statistics, data):
    order = torch.tensor(data.draw(st.permutations(range(len(statistics)))))
    assert_same(
        information(rows(statistics, order), estimator, aggregation), information(statistics, estimator, aggregation)
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(statistics=steps(), data=st.data())
def test_names_of_questions_and_rows_without_a_teacher_do_not_matter(aggregation, statistics, data):
    plain = information(statistics, aggregation=aggregation)
    assert_same(information(rows(statistics, statistics.has_teacher.bool()), aggregation=aggregation), plain)
    names = torch.tensor(data.draw(st.permutations(range(5))), dtype=torch.float32)
    columns = dict(zip(FIELDS, statistics.table().unbind(1), strict=True))
    columns["question"] = 10 * names[statistics.question.long()]
    assert_same(information(StepStatistics(**columns), aggregation=aggregation), plain)


@given(statistics=steps())
def test_a_question_whose_rows_come_twice_changes_no_mean(statistics):
    """Nor does the error shrink: copies of siblings are no new questions."""
    twice = StepStatistics.concatenate([statistics, statistics])
    assert_same(information(twice), information(statistics))


@given(statistics=steps())
def test_it_is_a_mean_over_the_rows_with_a_teacher(statistics):
    counted = [i for i, taught in enumerate(statistics.has_teacher.tolist()) if taught]
    value, error = information(statistics)
    if not counted:
        assert value == 0
        assert math.isnan(error)
        return
    gains = [statistics.entropy_student[i].item() - statistics.entropy_teacher[i].item() for i in counted]
    assert value == pytest.approx(sum(gains) / len(gains), rel=1e-5, abs=1e-6)
    assert math.isnan(error) == (len({statistics.question[i].item() for i in counted}) < 2)
