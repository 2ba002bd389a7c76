"""Multipliers as functions of the information and the step."""

import math

import pytest

from pgpo_lightning.callbacks import ConstantMultiplier, InformationMultiplier, RandomMultiplier
from pgpo_lightning.losses.step_statistics import StepStatistics
from tests.support.fixed_gradients import one_row


@pytest.mark.parametrize(
    ("settings", "information", "rho"),
    [
        ({}, 0.2, math.exp(0.2)),
        ({"sensitivity": 1.5}, 0.2, math.exp(0.3)),
        ({"alpha": 1.5}, 0.2, math.exp(0.3)),
        ({"sensitivity": 0.0}, 0.2, 1.0),
        ({}, -0.5, 1.0),  # the floor that keeps the paper's promise
        ({"rho_min": None}, -0.5, math.exp(-0.5)),
        ({"rho_min": 0.8}, -0.5, 0.8),
        ({"sensitivity": 10.0}, 0.5, 2.0),
        ({"sensitivity": 10.0, "rho_max": 4.0}, 0.5, 4.0),
        ({"sensitivity": 1e6}, 0.5, 2.0),  # exp() must not overflow
    ],
)
def test_equation_nine(settings, information, rho):
    multiplier = InformationMultiplier(**settings)
    statistics = one_row(1.0 + information, 1.0)
    assert multiplier.bounded(multiplier.multiplier(statistics, 0)) == pytest.approx(rho, rel=1e-6)


def test_no_row_with_a_teacher_is_no_information():
    multiplier = InformationMultiplier(sensitivity=3.0, rho_min=None)
    assert multiplier.multiplier(StepStatistics.empty(), 0) == 1.0


def test_signals_that_do_not_see_the_students_entropy():
    """A student that loses itself: its entropy rises, the teacher's stays."""
    steps = [(1.0, 0.4), (2.0, 0.4), (3.0, 0.5)]
    rho = lambda signal, **more: [  # noqa: E731
        math.log(multiplier.multiplier(one_row(*each), 0))
        for multiplier in [InformationMultiplier(signal=signal, rho_min=None, **more)]
        for each in steps
    ]
    assert rho("information") == pytest.approx([0.6, 1.6, 2.5])
    assert rho("teacher-certainty") == pytest.approx([-0.4, -0.4, -0.5])
    assert rho("relative") == pytest.approx([0.6, 0.6, 0.5])
    assert rho("relative", sensitivity=2.0) == pytest.approx([1.2, 1.2, 1.0])


def test_the_entropy_of_the_first_step_is_restored():
    first, resumed = (InformationMultiplier(signal="relative", rho_min=None) for _ in range(2))
    assert first.multiplier(StepStatistics.empty(), 0) == 1.0, "a step without a teacher is none to start from"
    first.multiplier(one_row(1.0, 0.4), 0)
    resumed.load_state_dict(first.state_dict())
    assert resumed.multiplier(one_row(5.0, 0.3), 1) == pytest.approx(math.exp(0.7))


def test_random_draws_depend_on_seed_and_step_alone():
    a, b = RandomMultiplier(0.5, 1.5, seed=1), RandomMultiplier(0.5, 1.5, seed=1)
    draws = [a.multiplier(StepStatistics.empty(), k) for k in range(2000)]
    assert draws[::-1] == [b.multiplier(StepStatistics.empty(), k) for k in reversed(range(2000))]
    assert 0.5 <= min(draws) < 0.51
    assert 1.49 < max(draws) <= 1.5
    assert sum(draws) / 2000 == pytest.approx(1.0, abs=0.03)
    assert draws[0] != RandomMultiplier(0.5, 1.5, seed=2).multiplier(StepStatistics.empty(), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InformationMultiplier(sensitivity=-1.0), "`sensitivity` to be at least 0, but got -1.0"),
        (lambda: InformationMultiplier(sensitivity=1.0, alpha=2.0), "only one of `sensitivity` and `alpha`"),
        (lambda: InformationMultiplier(rho_max=0.9), r"`rho_max` to lie in \[1, 1000\], but got 0.9"),
        (lambda: InformationMultiplier(rho_min=3.0), "`rho_min` to lie between 0 and `rho_max`"),
        (lambda: InformationMultiplier(estimator="entropy"), "`estimator` to be"),
        (lambda: InformationMultiplier(signal="gap"), "`signal` to be"),
        (
            lambda: InformationMultiplier(signal="teacher-certainty"),
            "`rho_min` below 1 with `signal` teacher-certainty",
        ),
        (
            lambda: InformationMultiplier(signal="relative", estimator="kl"),
            "`estimator` entropy-difference with `signal`",
        ),
        (lambda: InformationMultiplier(applies_to="loss"), "`applies_to` to be"),
        (lambda: InformationMultiplier(aggregation="mean"), "`aggregation` to be"),
        (lambda: ConstantMultiplier(-0.1), r"`value` to lie in \[0.001, 1000\], but got -0.1"),
        (lambda: ConstantMultiplier(0.0), r"`value` to lie in \[0.001, 1000\], but got 0.0"),
        (lambda: ConstantMultiplier(1e30), r"`value` to lie in \[0.001, 1000\], but got 1e\+30"),
        (lambda: RandomMultiplier(2.0, 1.0), "`low` to be at most `high`"),
    ],
)
def test_bad_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_multiplier_that_is_not_a_number_stops_the_run():
    with pytest.raises(RuntimeError, match="ConstantMultiplier to return a number"):
        ConstantMultiplier().bounded(math.nan)
