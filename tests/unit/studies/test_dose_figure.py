"""Score against learning rate x dose: where the rates of arms with and without a multiplier come from."""

import io

import pytest

from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.dose_figure import base_rate, draw_doses, mean_rates
from tests.support.studies import tiny

DESIGN = Design()


def run(seed, arm, rate=None, rho=()):
    curves = {}
    if rate is not None:
        steps = list(range(1, len(rho) + 1))
        curves = {"lr/effective": [steps, [rate * each for each in rho]], "lr/multiplier": [steps, list(rho)]}
    return tiny(seed, arm, curves=curves, rho=list(rho))


def test_the_base_rate_is_the_logged_one_without_the_multiplier():
    assert base_rate(run(0, "pgpo", 1e-4, (1.0, 3.0))) == pytest.approx(1e-4)
    assert base_rate(run(0, "sdpo")) is None


def test_every_arm_has_the_rate_of_its_condition_times_its_own_dose():
    runs = [run(seed, "pgpo", 1e-4, (1.0, 3.0)) for seed in (0, 1)] + [
        run(0, "sdpo"),
        run(0, "other", 1e-4, (0.5, 0.5)),
    ]
    (group,) = conditions(runs, DESIGN)
    assert mean_rates(group) == pytest.approx({"pgpo": 2e-4, "sdpo": 1e-4, "other": 5e-5})
    (alone,) = conditions([run(0, "sdpo")], DESIGN)
    assert mean_rates(alone) == {}


def test_conditions_without_rates_are_left_out_of_the_picture():
    groups = conditions(
        [run(0, "pgpo", 1e-4, (2.0,)), run(0, "sdpo"), tiny(0, "sdpo", study="without")],
        DESIGN,
    )
    picture = io.BytesIO()
    draw_doses(groups, DESIGN, picture)
    assert picture.getvalue().startswith(b"\x89PNG")
