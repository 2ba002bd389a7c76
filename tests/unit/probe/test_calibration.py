"""Gains of runs predicted from gaps: the calibration, its intervals and what it excludes."""

import json
import lzma
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pgpo_lightning.commands.probe import calibrate
from pgpo_lightning.core.files import plain, write_json
from pgpo_lightning.monitoring.run_record import RunRecord, load_runs, write_runs
from pgpo_lightning.probe.calibration import Point, bootstrap, points
from pgpo_lightning.probe.contexts import contexts
from tests.support.helpers import tiny_sdpo


def finished(folder, seed, gains):
    """The record of a run whose held-out questions gained so much."""
    scores = {"0": [0.2] * len(gains), "30": [0.2 + gain for gain in gains]}
    RunRecord(folder.parent.parent.name, folder.parent.name, seed, 30, 4, 1.0, 1.0, {}, scores).save(
        folder / "run.json"
    )


def study(content, tmp_path, slope=2.0, noise=0.0):
    """Runs whose gain is 0.01 + slope * gap of their context."""
    root = tmp_path / "study"
    write_json(root / "probe.json", plain(content))
    gaps = {made["name"]: made["net"]["value"] for made in content["contexts"] if made["control"] is None}
    rng = np.random.default_rng(0)
    for name in ("none", "careful", "sibling"):
        for seed in (0, 1):
            each = 0.01 + slope * gaps[name] + noise * rng.standard_normal(4)
            finished(root / "base" / name / f"seed={seed}", seed, each.tolist())
    return root, gaps


def test_gains_are_predicted_from_gaps(parrot, tmp_path, capsys):
    root, gaps = study(parrot, tmp_path)
    content = calibrate([str(root)], predict=[0.3], output=str(tmp_path / "out"))
    assert content["slope"] == pytest.approx(2)
    assert content["intercept"] == pytest.approx(0.01)
    assert content["loo_rmse"] == pytest.approx(0, abs=1e-9)
    assert content["range"] == [0, 0.5]
    told = {made["name"]: made for made in content["predictions"]}
    assert told["g = 0.3"]["gain"] == pytest.approx(0.61)
    assert told["feedback"]["gain"] == pytest.approx(0.01 + 2 * gaps["feedback"])
    assert {"own", "own+feedback", "feedback", "g = 0.3"} <= set(told)
    text = (tmp_path / "out" / "calibration.md").read_text()
    assert "**Δ = +0.010 +2.000 g** from 3 configurations" in text
    assert "High leverage: none (0.83), sibling (0.83)" in text
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 5000
    assert "Predictions" in capsys.readouterr().out


def test_a_context_beyond_the_calibrated_range_is_not_predicted(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    finished(root / "base" / "feedback" / "seed=0", 0, [0.1] * 4)
    content = json.loads((root / "probe.json").read_text())
    next(made for made in content["contexts"] if made["name"] == "own")["net"]["value"] = 0.9
    (root / "probe.json").write_text(json.dumps(content))
    told = {made["name"]: made for made in calibrate([str(root)], output=str(tmp_path / "out"))["predictions"]}
    assert (told["own"]["gain"], told["own"]["inside"]) == (None, False)
    assert "not predicted" in (tmp_path / "out" / "calibration.md").read_text()
    with pytest.raises(ValueError, match="calibrated range"):
        calibrate([str(root)], predict=[0.9], output=str(tmp_path / "out"))
    told = calibrate([str(root)], predict=[0.9], extrapolate=True, output=str(tmp_path / "out"))["predictions"]
    assert told[0]["gain"] is not None
    assert "outside [+0.000, +0.500]" in (tmp_path / "out" / "calibration.md").read_text()


def test_a_gap_that_predicts_nothing_is_reported_as_such(parrot, tmp_path):
    root, _ = study(parrot, tmp_path, slope=0.0, noise=0.3)
    content = calibrate([str(root)], output=str(tmp_path / "out"))
    assert content["loo_rmse"] > content["loo_constant"]
    assert "predicts no better" in (tmp_path / "out" / "calibration.md").read_text()


def test_a_collapse_is_named_and_fitted_around(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    finished(root / "base" / "feedback" / "seed=0", 0, [-0.19] * 4)
    content = calibrate([str(root)], output=str(tmp_path / "out"))
    assert [made["name"] for made in content["points"] if made["collapsed"]] == ["feedback"]
    assert content["slope"] < 1.5
    assert content["without_collapsed"]["slope"] == pytest.approx(2)
    assert (
        "their first score: feedback. Line through the other 3: Δ = +0.010 +2.000 g"
        in (tmp_path / "out" / "calibration.md").read_text()
    )


def test_the_bootstrap_draws_questions_and_seeds(parrot, tmp_path):
    root, _ = study(parrot, tmp_path, noise=0.2)
    found = points([root], None, "all")
    assert [point.name for point in found] == ["careful", "none", "sibling"]
    assert all(point.held_out and point.seeds == (0, 1) for point in found)
    boot = bootstrap(found, draws=4000)
    for i, point in enumerate(found):
        table = point.gain
        rows, columns, cells = table.mean(axis=1).var() / 2, table.mean(axis=0).var() / 4, table
        cells = (table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()).var() / 8
        assert boot.gains[i] == pytest.approx((rows + columns + cells) ** 0.5, rel=0.06)
    low, high = boot.interval(boot.slopes)
    assert low < 2 < high


def point(gap, gain, seeds=(0, 1), questions="same"):
    return Point("run", "c", gap, gain, seeds, (30,) * len(seeds), questions, Path("probe.json"), False, False)


def test_an_error_that_all_gaps_have_in_common_does_not_make_them_unreliable():
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal(400), rng.standard_normal((3, 400))
    gain = np.zeros((2, 5))
    alike = bootstrap([point(shared + shift, gain) for shift in (0.0, 0.1, 0.2)])
    assert alike.gaps == pytest.approx(400**-0.5, rel=0.1)
    assert alike.noise == pytest.approx(0, abs=1e-12)
    apart = bootstrap([point(shared + own[i], gain) for i in range(3)])
    assert apart.gaps == pytest.approx((2 / 400) ** 0.5, rel=0.15)
    assert apart.noise == pytest.approx(1 / 400, rel=0.15)  # that of `own` alone
    # Other questions: nothing in common.
    other = bootstrap([point(shared + i, gain, questions=str(i)) for i in range(3)])
    assert other.noise == pytest.approx(1 / 400, rel=0.15)


def test_other_seeds_and_questions_are_drawn_independently():
    """With the same draws, two runs whose first seed was the better one would vary together whatever their seeds are."""
    rng = np.random.default_rng(0)
    gain = np.array([[0.1], [0.2]]) + np.zeros((2, 5))
    gap = rng.standard_normal(50)
    spread = lambda *given: bootstrap(list(given), draws=4000).slopes.std()  # noqa: E731
    low, high = point(gap, gain), point(gap + 1, gain)
    assert spread(low, high) == pytest.approx(0, abs=1e-9)
    far = point(gap + 1, gain, seeds=(2, 3))
    assert spread(low, far) == pytest.approx(
        0.1 / 2**0.5 / 2**0.5, rel=0.06
    )  # of the difference of two means of two seeds


def test_runs_find_their_context_by_their_settings(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    content = json.loads((root / "probe.json").read_text())
    module = tiny_sdpo(max_reprompt_len=300)
    none = asdict(contexts([], {}, [], module.objective.teaching.builder)[0].builder)
    reward = {"success_threshold": none.pop("success_reward_threshold")}
    settings = {"model": {"init_args": {"model": "parrot", "verifier": "boxed", "reprompt": none, "reward": reward}}}
    settings["model"]["init_args"]["reward"] = {"class_path": "RewardConfig", "init_args": reward}  # as a run writes it
    folder = root / "base" / "careful" / "seed=0"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert {point.context for point in points([folder], None, "failed")} == {"none"}  # whatever its folder is called
    settings["model"]["init_args"]["reprompt"]["reprompt_template"] = "{prompt} Other"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        ValueError, match=r"none of its 7 contexts has these settings; .* differs in `reprompt_template`"
    ):
        points([folder], None, "all")
    settings["model"]["init_args"]["reprompt"]["reprompt_template"] = "{prompt}!!"
    settings["model"]["init_args"]["verifier"] = {"class_path": "strict"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"`model.init_args.verifier` of .*config.yaml to be that of"):
        points([folder], None, "all")
    assert content["contexts"][0]["name"] == "none"
    del settings["model"]["init_args"]["reprompt"]  # a GRPO has none
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"config.yaml to be of a run with a self-teacher"):
        points([folder], None, "all")
    for text in ("trainer: {}", "model: {", ""):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml to be the configuration of a run, but reading it failed"):
            points([folder], None, "all")


@pytest.mark.parametrize("compressed", [False, True])
def test_records_in_one_file_are_as_good_as_folders(parrot, tmp_path, compressed):
    root, _ = study(parrot, tmp_path, noise=0.05)
    expected = points([root], None, "all")
    (tmp_path / "kept").mkdir()
    shutil.copy(root / "probe.json", tmp_path / "kept")
    file = tmp_path / "kept" / "runs.jsonl"
    write_runs(load_runs([root]), file)
    if compressed:
        file = file.with_suffix(".jsonl.xz")
        file.write_bytes(lzma.compress(file.with_suffix("").read_bytes()))
    for found, one in zip(points([file], None, "all"), expected, strict=True):
        assert (found.name, found.context, found.seeds) == (one.name, one.context, one.seeds)
        np.testing.assert_array_equal(found.gain, one.gain)
    run = replace(load_runs([root])[0], arm="elsewhere")
    write_runs([run], tmp_path / "kept" / "runs.jsonl")
    with pytest.raises(ValueError, match="named after a context"):
        points([tmp_path / "kept" / "runs.jsonl"], None, "all")


def test_runs_without_what_is_needed_are_refused(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Expected finished runs in"):
        points([tmp_path / "empty"], None, "all")
    with pytest.raises(ValueError, match=r"there is no .*elsewhere"):
        points([root], tmp_path / "elsewhere", "all")
    with pytest.raises(ValueError, match="at least 3 configurations"):
        calibrate([str(root / "base" / "none"), str(root / "base" / "sibling")], output=str(tmp_path / "out"))
    finished(root / "base" / "peer" / "seed=0", 0, [0.1] * 4)
    with pytest.raises(ValueError, match="named after a context"):
        points([root], None, "all")
    shutil.rmtree(root / "base" / "peer")
    RunRecord("base", "none", 5, 30, 4, 1.0, 1.0, {}, {"30": [0.1] * 4}).save(
        root / "base" / "none" / "seed=5" / "run.json"
    )
    with pytest.raises(ValueError, match="evaluated before the first step and at the end"):
        points([root], None, "all")
    finished(root / "base" / "none" / "seed=5", 5, [0.1, 0.1, float("nan"), 0.1])
    with pytest.raises(ValueError, match="scores of none/seed=5 to be numbers"):
        points([root], None, "all")
    shutil.rmtree(root / "base" / "none" / "seed=5")
    content = json.loads((root / "probe.json").read_text())
    next(row for row in content["contexts"] if row["name"] == "sibling")["by_question"][1] = None
    (root / "probe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`by_question` of sibling in .*probe.json to be numbers"):
        points([root], None, "all")
    for text in ('{"settings": {}, "contexts": 3}', '{"settings": {}, "contexts": []}', "[]", '{"sett'):
        (root / "probe.json").write_text(text)
        with pytest.raises(ValueError, match=r"probe.json to be the result of `pgpo probe`, but reading it failed"):
            points([root], None, "all")


def test_what_the_line_does_not_speak_of(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    longer = RunRecord("base", "sibling", 2, 60, 4, 1.0, 1.0, {}, {"0": [0.2] * 4, "60": [0.9] * 4})
    longer.save(root / "base" / "sibling" / "seed=2" / "run.json")
    content = json.loads((root / "probe.json").read_text())
    next(row for row in content["contexts"] if row["name"] == "own")["coverage"] = 0.0
    (root / "probe.json").write_text(json.dumps(content))
    told = calibrate([str(root)], output=str(tmp_path / "out"))
    assert [row["name"] for row in told["predictions"]] == ["feedback", "own+feedback", "sibling+feedback"]
    assert "Runs of 30, 60 steps" in (tmp_path / "out" / "calibration.md").read_text()
