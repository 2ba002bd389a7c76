"""`pgpo report`: from the records of runs to tables, pictures and one sentence."""

import json
from dataclasses import replace

import pytest

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.report import report
from pgpo_lightning.monitoring.run_record import write_runs
from pgpo_lightning.studies.simulation import World
from tests.support.studies import runs, study_of, tiny


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("draw_curves", "draw_forest", "draw_multipliers"):
        monkeypatch.setattr(f"pgpo_lightning.commands.report.{name}", lambda *args: None)


@pytest.mark.usefixtures("no_pictures")
def test_a_single_seed_is_reported_without_intervals(tmp_path):
    write_runs(runs(world=World(seeds=1, questions=20)), tmp_path / "runs.jsonl")
    content = report([tmp_path / "runs.jsonl"], str(tmp_path / "out"))
    assert content["conclusion"].startswith(
        "Information helps beyond its dose: not resolved, because a single seed has no interval"
    )
    row = study_of(content)["comparisons"][0]["final"]
    assert isinstance(row["value"], float)
    assert (row["low"], row["high"], row["p"], row["bootstrap"]) == (None, None, None, [None, None])
    assert "A single seed" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_writes_tables_pictures_and_the_sentence(tmp_path, capsys):
    write_runs(runs(1, "one"), tmp_path / "one.jsonl")
    for run in runs(2, "two"):
        run.save(tmp_path / run.study / run.arm / f"seed={run.seed}" / "run.json")
    out = tmp_path / "out"
    words = ["report", str(tmp_path / "one.jsonl"), str(tmp_path / "two"), "--output", str(out)]
    main([*words, "--information", "[pgpo*,centred*]", "--decisive", "[constant,random]", "--margin", "0.03"])
    text, content = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert text.rstrip().endswith(f"**{content['conclusion']}**")
    assert capsys.readouterr().out.startswith(content["conclusion"])
    assert content["design"]["information"] == ["pgpo*", "centred*"]
    assert content["design"]["margin"] == 0.03
    assert (content["cost"]["runs"], content["cost"]["seconds"]) == (48, 48 * 60)
    for picture in ("curves.png", "forest.png", "multipliers.png"):
        assert f"({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "biased upwards" in text
    assert "| pgpo-1.0 − constant-1.0 | 4 | " in text
    # From the records that it wrote beside the report, everything can be made again.
    main(["report", str(out / "runs.jsonl"), "--output", str(tmp_path / "again"), "--information", "[pgpo*,centred*]",
          "--decisive=[constant,random]", "--margin=0.03"])  # fmt: skip
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_without_multipliers_there_is_no_dose_to_report(tmp_path):
    made = [tiny(seed, arm, rho=[]) for arm in ("grpo", "hapo") for seed in (0, 1)]
    write_runs(made, tmp_path / "runs.jsonl")
    report([str(tmp_path / "runs.jsonl")], str(tmp_path / "out"), baseline="grpo")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| entropy |\n" in text
    assert "hapo − grpo" in text
    assert not (tmp_path / "out" / "multipliers.png").exists()
    write_runs([replace(run, rho=[1.1]) for run in made], tmp_path / "runs.jsonl")
    report([str(tmp_path / "runs.jsonl")], str(tmp_path / "out"), baseline="grpo")
    assert "| entropy | dose |\n" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "multipliers.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_command_takes_options_before_the_runs(tmp_path):
    write_runs(runs(), tmp_path / "runs.jsonl")
    main(["report", "--output", str(tmp_path / "out"), "--information", "pgpo*", str(tmp_path / "runs.jsonl")])
    assert (tmp_path / "out" / "report.md").exists()
