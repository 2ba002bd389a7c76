"""Intervals of a report cover what they promise, over simulated studies whose truth is known."""

import pytest

from benchmarks.study_simulation import main
from pgpo_lightning.studies.simulation import World, measure
from tests.support.inference import STUDIES, noise


def test_a_planted_difference_is_covered_at_the_nominal_rate():
    found = measure(0.03, World(), STUDIES, seed=10_000, draws=0)
    assert found["covered"] == pytest.approx(0.95, abs=noise(0.95))
    assert found["yes"] > 0.6
    assert found["no"] <= 0.025


def test_no_difference_is_covered_and_taken_for_one_at_most_at_the_nominal_rate():
    found = measure(0.0, World(), STUDIES, seed=20_000, draws=0)
    assert found["covered"] == pytest.approx(0.95, abs=noise(0.95))
    assert found["yes"] <= 0.025 + noise(0.025)
    assert found["no"] > 0.3
    assert found["seeds_needed"] > 10


def test_the_simulation_is_a_command(capsys):
    main(World(seeds=4, questions=20), repeats=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["covered", "bootstrap_covered", "yes"]
