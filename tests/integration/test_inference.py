"""A planned simulation runs, and a planted difference is found at the rate that its power says."""

import json

import pytest

from benchmarks.study_simulation import Case, looks, main, one_condition, sample_sizes
from pgpo_lightning.studies.simulation import World
from tests.support.inference import noise


def test_a_planted_difference_is_covered_at_the_nominal_rate():
    found = one_condition(Case("", 0.05, {}), World(), 300, draws=200)
    assert found["covered"] == pytest.approx(0.95, abs=noise(0.95, 300))
    assert found["averaged"] == pytest.approx(0.95, abs=noise(0.95, 300))
    assert found["yes"] > 0.6
    assert found["false"] <= 0.025 + noise(0.025, 300)


def test_looks_hold_the_error_rate_and_save_seeds():
    found = looks(0.05, World(questions=40), 100)
    assert found["obrien-fleming"]["seeds"] < 25
    assert found["pocock"]["seeds"] < found["obrien-fleming"]["seeds"]
    assert found["pocock"]["yes"] > 0.9
    nothing = looks(0.0, World(questions=40), 100)
    assert nothing["obrien-fleming"]["yes"] <= 0.025 + noise(0.025, 100)
    assert nothing["peeking"]["seeds"] <= nothing["pocock"]["seeds"] <= nothing["obrien-fleming"]["seeds"]


def test_the_range_of_seeds_contains_the_true_number():
    found = sample_sizes(World(questions=60), 100)
    assert found["low"] < found["needed"] < found["high"]
    assert found["inside"] == pytest.approx(0.9, abs=noise(0.9, 100))


def test_the_simulation_is_a_command(capsys, tmp_path):
    main(World(questions=20), seeds=(5,), repeats=2, output=str(tmp_path / "simulation.json"))
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## one condition",
        "## three conditions",
        "## looks",
        "## sample sizes",
    ]
    assert "| 5 seeds, 5 % of the controls' runs collapse | " in text
    content = json.loads((tmp_path / "simulation.json").read_text())
    assert content["looks"]["gain 0, once"]["seeds"] == 30
