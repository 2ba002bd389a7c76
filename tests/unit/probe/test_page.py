"""Figures of docs/probe.md are those of the committed probe and runs."""

import re

import pytest

from pgpo_lightning.commands.probe import calibrate
from pgpo_lightning.probe.calibration import read_probe
from pgpo_lightning.probe.probe_report import probe_report
from tests.support import ROOT
from tests.support.committed import page

FOLDER = ROOT / "docs" / "probe"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return calibrate([str(FOLDER / "runs.jsonl.xz")], output=str(tmp_path_factory.mktemp("calibration")))


def test_rows_of_the_probe():
    report = probe_report(read_probe(FOLDER / "probe.json"), "probe.png")
    rows = [line for line in report.splitlines() if line.startswith("| ") and "context" not in line]
    assert len(rows) == 11
    text = (ROOT / "docs" / "probe.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in text] == []
    assert "Score of the student: 0.424 ± 0.020" in text


def test_rows_of_the_calibration(calibrated):
    text = page("probe.md")
    for point in calibrated["points"]:
        by_seed = ", ".join(f"{gain:+.3f}" for gain in point["gain_by_seed"])
        cells = f"{point['gain']:+.3f} ± {point['gain_error']:.3f} | {by_seed} | {point['left_out']:+.3f} |"
        assert re.search(rf"\| {re.escape(point['name'])} \|[^|]*\|[^|]*\| {re.escape(cells)}", text), cells


def test_the_line_is_that_of_the_page(calibrated):
    text, line = page("probe.md"), calibrated
    low, high = line["slope_interval"]
    resampled = line["slope_resampled"]
    assert f"Δ = {line['intercept']:+.3f} {'+' if line['slope'] > 0 else '-'} {abs(line['slope']):.3f} g" in text
    assert (
        f"b in [{low:.2f}, {high:.2f}] over other contexts ([{resampled[0]:.2f}, {resampled[1]:.2f}] over other" in text
    )
    assert f"R² {line['r2']:.2f}" in text
    assert f"leave-one-out RMSE is {line['loo_rmse']:.3f}, against {line['loo_constant']:.3f} for" in text
    assert f"LOO R² {line['loo_r2']:.2f} against the mean of all" in text
