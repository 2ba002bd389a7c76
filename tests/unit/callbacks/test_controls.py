"""Controls match what they are matched to, and differ from PGPO in the one thing that they are for."""

import math
import random
from itertools import pairwise
from statistics import fmean

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    CentredMultiplier,
    InverseMultiplier,
    MatchedConstantMultiplier,
    MatchedRandomMultiplier,
    OracleMultiplier,
    ReplayedMultiplier,
    ShuffledMultiplier,
)
from pgpo_lightning.losses.step_statistics import StepStatistics
from tests.support.controls import RECORD, record
from tests.support.fixed_gradients import one_row

MATCHED = [MatchedConstantMultiplier, MatchedRandomMultiplier, ShuffledMultiplier]
NOTHING = StepStatistics.empty()


def steps(multiplier, information):
    """Rho of every step of a run with such an information, as the callback would decide it."""
    for k, value in enumerate(information):
        multiplier.history.append(multiplier.bounded(multiplier.multiplier(one_row(1.0 + value, 1.0), k)))
    return multiplier.history


@pytest.mark.parametrize("make", MATCHED)
@pytest.mark.parametrize("rho", [RECORD, [1.0, 2.0], [0.1] * 9 + [3.0], [1.05]], ids=["trend", "two", "spike", "one"])
def test_the_dose_is_the_records(tmp_path, make, rho):
    path = record(tmp_path, rho)
    for seed in range(20):
        multiplier = make(path) if make is MatchedConstantMultiplier else make(path, seed)
        dose = fmean(multiplier.multiplier(NOTHING, k) for k in range(len(rho)))
        assert dose == pytest.approx(fmean(rho), rel=1e-12)


def test_constant_shuffled_and_replayed_have_the_records_values(tmp_path):
    path = record(tmp_path)
    every = lambda multiplier: [multiplier.multiplier(NOTHING, k) for k in range(30)]  # noqa: E731
    assert set(every(MatchedConstantMultiplier(path))) == {fmean(RECORD)}
    assert every(ReplayedMultiplier(path)) == RECORD == every(ReplayedMultiplier(str(tmp_path)))
    shuffled = every(ShuffledMultiplier(path, seed=1))
    assert shuffled != RECORD
    assert sorted(shuffled) == sorted(RECORD)


def test_random_draws_are_the_records_values_but_for_one_factor(tmp_path):
    rho = [1.0 + k * k / 1000 for k in range(100)]
    draws = MatchedRandomMultiplier(record(tmp_path, rho), seed=1).sequence
    in_record = lambda value: any(math.isclose(value, other, rel_tol=1e-9) for other in rho)  # noqa: E731
    (factor,) = [f for f in (draws[0] / value for value in rho) if all(in_record(draw / f) for draw in draws)]
    assert factor == pytest.approx(1.0, rel=0.1)
    assert len(set(draws)) < 100, "with replacement"


@pytest.mark.parametrize("make", [MatchedRandomMultiplier, ShuffledMultiplier])
def test_an_order_depends_on_the_seed_alone(tmp_path, make):
    path = record(tmp_path)
    a, b, other = make(path, 1), make(path, 1), make(path, 2)
    assert [a.multiplier(one_row(9.0, 1.0), k) for k in range(30)] == [
        b.multiplier(NOTHING, k) for k in reversed(range(30))
    ][::-1]
    assert a.sequence != other.sequence


def test_a_record_that_changed_is_refused(tmp_path):
    state = MatchedConstantMultiplier(record(tmp_path)).state_dict()
    MatchedConstantMultiplier(record(tmp_path)).load_state_dict(state)
    changed = MatchedConstantMultiplier(record(tmp_path, RECORD[::-1]))
    with pytest.raises(MisconfigurationException, match="to be the record that this run began with"):
        changed.load_state_dict(state)


@pytest.mark.parametrize(("alpha", "shift"), [(1.0, 0.0), (5.0, 0.0), (5.0, 0.02)])
def test_inverse_has_the_dose_of_the_record_and_falls_with_information(tmp_path, alpha, shift):
    for seed in range(5):
        rng = random.Random(seed)
        theirs, mine = ([0.05 + shift * own + rng.gauss(0, 0.01) for _ in range(40)] for own in (0, 1))
        multiplier = InverseMultiplier(record(tmp_path, [math.exp(alpha * i) for i in theirs]), sensitivity=alpha)
        rho = steps(multiplier, mine)
        assert fmean(rho) == pytest.approx(fmean(multiplier.record), rel=0.01)
        falls = [(b - a) * (j - i) < 0 for (a, b), (i, j) in zip(pairwise(rho), pairwise(mine), strict=True)]
        assert fmean(falls) > 0.9


def test_inverse_is_one_constant_times_the_inverse_where_both_runs_agree(tmp_path):
    information = [0.05 + 0.04 * math.sin(k) for k in range(30)]
    recorded = [math.exp(3 * value) for value in information]
    multiplier = InverseMultiplier(record(tmp_path, recorded), sensitivity=3.0)
    constant = fmean(recorded) / fmean(1 / rho for rho in recorded)
    assert steps(multiplier, information) == pytest.approx([constant / rho for rho in recorded], rel=1e-5)


def test_inverse_knows_nothing_of_what_comes(tmp_path):
    path = record(tmp_path)
    a, b = [0.05] * 15 + [0.1] * 15, [0.05] * 15 + [0.0] * 15
    assert steps(InverseMultiplier(path), a)[:15] == steps(InverseMultiplier(path), b)[:15]


@pytest.mark.parametrize(
    ("settings", "information", "rho"),
    [
        ({}, [0.2, 0.2, 0.2], [1.0, 1.0, 1.0]),
        ({"sensitivity": 2.0, "decay": 0.0}, [0.1, 0.2, 0.1], [1.0, math.exp(0.2), math.exp(-0.2)]),
        # The average before the third step: (0.5 * 0.1 + 0.3) / 1.5.
        ({"decay": 0.5}, [0.1, 0.3, 0.5], [1.0, math.exp(0.2), math.exp(0.5 - 0.35 / 1.5)]),
        ({"sensitivity": 100.0}, [0.1, 0.2, 0.0], [1.0, 2.0, 0.5]),
        ({"sensitivity": 1e6, "rho_min": None, "rho_max": 1.1}, [0.1, 0.2], [1.0, 1.1]),
    ],
)
def test_centred(settings, information, rho):
    assert steps(CentredMultiplier(**settings), information) == pytest.approx(rho, rel=1e-5)


def test_centred_passes_over_a_step_without_a_teacher():
    multiplier = CentredMultiplier(sensitivity=2.0)
    steps(multiplier, [0.1, 0.2])
    state = multiplier.state_dict()
    assert multiplier.multiplier(NOTHING, 2) == 1.0
    assert multiplier.state_dict() == state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: MatchedConstantMultiplier(str(folder / "nothing")),
            "the record of a finished run, but there is no",
        ),
        (lambda folder: ShuffledMultiplier(record(folder, [])), "`run` to be a run with a multiplier, but .* has none"),
        (lambda folder: ReplayedMultiplier(record(folder, [1.0, 0.0])), "multipliers above 0, but .* has 0.0"),
        (
            lambda folder: InverseMultiplier(record(folder, [3.0])),
            "to enclose the record's mean 3, but got 0.0 and 2.0",
        ),
        (lambda folder: InverseMultiplier(record(folder), sensitivity=-1.0), "`sensitivity` to be at least 0"),
        (lambda _: CentredMultiplier(decay=1.0), r"`decay` to lie in \[0, 1\), but got 1.0"),
        (lambda _: CentredMultiplier(rho_min=1.5), r"`rho_min` to lie in \[0, 1\], but got 1.5"),
        (lambda _: OracleMultiplier({"sibling": -1.0}), r"`multipliers"),
    ],
)
def test_bad_settings_name_the_field(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
