"""What a report says of its own coverage is what the committed simulation measured."""

import json

import pytest

from benchmarks.study_simulation import rates
from pgpo_lightning.studies.coverage import ALIVE, COLLAPSED, RATES, STUDIES, coverage_text
from tests.support import ROOT

MEASURED = json.loads((ROOT / "docs" / "studies" / "simulation.json").read_text())


@pytest.mark.parametrize("seeds", [3, 5, 10, 30])
def test_rates_are_those_of_the_committed_simulation(seeds):
    assert RATES[seeds] == pytest.approx(rates(MEASURED, seeds))
    assert MEASURED["repeats"] == STUDIES


def test_the_text_has_the_rates_of_the_closest_number_of_seeds():
    text = coverage_text(12, collapsed=True)
    assert "simulated studies with 10 seeds (" in text
    assert f"contains the true value in {100 * RATES[10].covered:.1f} %" in text
    assert f"only\n  {100 * RATES[10].covered_one:.1f} % and {100 * RATES[10].averaged_one:.1f} %**" in text
    assert text.endswith(COLLAPSED)
    assert coverage_text(12, collapsed=False).endswith(ALIVE)
    numbers = [
        int(coverage_text(n, False).split(" seeds (")[0].rsplit(" ", 1)[1]) for n in (1, 3, 4, 7, 8, 17, 18, 100)
    ]
    assert numbers == [3, 3, 5, 5, 10, 10, 30, 30]


def test_the_page_has_the_figures_of_the_simulation():
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for name, line in MEASURED["one condition"].items():
        seeds, case = name.split(" seeds, ")
        cells = [f"{line[key]:.3f}" for key in ("covered", "averaged", "yes", "equivalent", "no", "false")]
        if seeds in ("5", "10", "30"):
            assert f"| {seeds} | {case} | {' | '.join(cells)} |" in page
    for name, line in MEASURED["looks"].items():
        gain, rule = name.removeprefix("gain ").split(", ")
        assert f"| {gain} | {rule} | {line['yes']:.3f} | {line['seeds']:.1f} | {line['one comparison']:.3f} |" in page
