"""The record that a run leaves for a study."""

import pytest

from pgpo_lightning.lab.runs import Run, collect, load_runs, write_runs


def run(seed=0, arm="sdpo", **fields):
    known = {
        "study": "lr=1e-4",
        "arm": arm,
        "seed": seed,
        "steps": 2,
        "samples": 4,
        "seconds": 3.5,
        "cpu_seconds": 3.0,
        "curves": {"val/avg@4": [[0, 2], [0.25, 0.5]]},
        "questions": {"0": [0.0, 0.5], "2": [0.5, 0.5]},
        "rho": [1.0, 1.25],
    }
    return Run(**known | fields)


def test_a_run_comes_back_as_it_was(tmp_path):
    run().save(tmp_path / "run.json")
    assert Run.load(tmp_path) == run() == Run.load(tmp_path / "run.json")
    assert run().scores == ([0, 2], [0.25, 0.5])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_many_runs_come_in_one_order_from_folders_and_files(tmp_path):
    runs = [run(arm=arm, seed=seed) for arm in ("pgpo", "sdpo") for seed in (0, 1)]
    for each in reversed(runs):
        each.save(tmp_path / each.study / each.arm / f"seed={each.seed}" / "run.json")
    write_runs(runs, tmp_path / "all.jsonl")
    assert load_runs([tmp_path / "all.jsonl"]) == runs == load_runs([tmp_path / "lr=1e-4"])
    with pytest.raises(ValueError, match=r"all.jsonl holds lr=1e-4/pgpo/0 again"):
        load_runs([tmp_path / "lr=1e-4", tmp_path / "all.jsonl"])


@pytest.mark.parametrize(
    ("text", "message"), [("{", "to be JSON"), ("[]", "but got list"), ('{"arm": "sdpo"}', r"but got \['arm'\]")]
)
def test_a_broken_record_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json.*{message}"):
        Run.load(tmp_path)
    (tmp_path / "all.jsonl").write_text("\n" + text)
    with pytest.raises(ValueError, match=r"all\.jsonl:2"):
        load_runs([tmp_path / "all.jsonl"])


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        load_runs([tmp_path])


def test_the_record_takes_what_studies_need_from_curves_and_answers(tmp_path):
    folder = tmp_path / "lr=1e-4" / "pgpo" / "seed=3"
    (folder / "validation").mkdir(parents=True)
    (folder / "validation" / "step=000002.jsonl").write_text('{"avg": 0.333333333}\n{"avg": 1.0}\n')
    scalars = {"val/avg@4": {2: 0.66666}, "actor/grad_norm": {2: 1.0, 1: float("nan")}, "timing_s/step": {1: 9.0}}
    made = collect(folder, scalars, seed=3, steps=2, samples=4, seconds=1.0, cpu_seconds=1.0, rho=[1.5])
    assert (made.study, made.arm, made.rho) == ("lr=1e-4", "pgpo", [1.5])
    assert made.curves == {"val/avg@4": [[2], [0.66666]], "actor/grad_norm": [[2], [1.0]]}
    assert made.questions == {"2": [0.33333, 1.0]}
