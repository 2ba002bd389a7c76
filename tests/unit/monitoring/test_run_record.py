"""The record that a run leaves for a study."""

import json
import lzma
from dataclasses import asdict

import pytest

from pgpo_lightning.core.identity import joint_sha256
from pgpo_lightning.monitoring.run_record import RunRecord, collect, load_runs, write_runs
from tests.support import ROOT


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
    return RunRecord(**known | fields)


def test_a_run_comes_back_as_it_was(tmp_path):
    run().save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path) == run() == RunRecord.load(tmp_path / "run.json")
    assert run().scores == ([0, 2], [0.25, 0.5])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_many_runs_come_in_one_order_from_folders_and_files(tmp_path):
    runs = [run(arm=arm, seed=seed) for arm in ("pgpo", "sdpo") for seed in (0, 1)]
    for each in reversed(runs):
        each.save(tmp_path / each.study / each.arm / f"seed={each.seed}" / "run.json")
    write_runs(runs, tmp_path / "all.jsonl")
    assert load_runs([tmp_path / "all.jsonl"]) == runs == load_runs([tmp_path / "lr=1e-4"])
    (tmp_path / "small.jsonl.xz").write_bytes(lzma.compress((tmp_path / "all.jsonl").read_bytes()))
    assert load_runs([tmp_path / "small.jsonl.xz"]) == runs
    (tmp_path / "broken.jsonl.xz").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"broken.jsonl.xz to be a file of xz"):
        load_runs([tmp_path / "broken.jsonl.xz"])
    with pytest.raises(ValueError, match=r"all.jsonl holds lr=1e-4/pgpo/0 again"):
        load_runs([tmp_path / "lr=1e-4", tmp_path / "all.jsonl"])


@pytest.mark.parametrize(
    ("text", "message"), [("{", "to be JSON"), ("[]", "but got list"), ('{"arm": "sdpo"}', r"but got \['arm'\]")]
)
def test_a_broken_record_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json.*{message}"):
        RunRecord.load(tmp_path)
    (tmp_path / "all.jsonl").write_text("\n" + text)
    with pytest.raises(ValueError, match=r"all\.jsonl:2"):
        load_runs([tmp_path / "all.jsonl"])


WRONG = [
    ({"seed": "0"}, "`seed` to be a whole number, but got '0'"),
    ({"seed": -1}, "`seed` to lie in"),
    ({"seed": True}, "`seed` to be a whole number, but got True"),
    ({"steps": 2.5}, "`steps` to be a whole number, but got 2.5"),
    ({"steps": None}, "`steps` to be a whole number, but got null"),
    ({"samples": 0}, "`samples` to be at least 1"),
    ({"arm": ["a"]}, "`arm` to be a text, but got ['a']"),
    ({"study": 3}, "`study` to be a text, but got 3"),
    ({"seconds": "3"}, "`seconds` to be a number, but got '3'"),
    ({"curves": []}, "`curves` to be a mapping, but got []"),
    ({"curves": {"a": [[0, 1]]}}, "`curves['a']` to be two lists of one length"),
    ({"curves": {"a": [[0, 1], [0.5]]}}, "`curves['a']` to be two lists of one length"),
    ({"curves": {"a": [[0, "1"], [0.5, 0.5]]}}, "`curves['a'][0][1]` to be a number, but got '1'"),
    ({"curves": {"a": [[1, 0], [0.5, 0.5]]}}, "steps of `curves['a']` to be whole numbers that rise"),
    ({"curves": {"a": [[float("nan")], [0.5]]}}, "steps of `curves['a']` to be whole numbers that rise"),
    ({"curves": {"a": [[10**400], [0.5]]}}, "int too large"),
    ({"questions": {"0": 1.0}}, "`questions['0']` to be a list, but got 1.0"),
    ({"questions": {"0": [None]}}, "`questions['0'][0]` to be a number, but got null"),
    ({"questions": {"first": [1.0]}}, "keys of `questions` to be steps, but got 'first'"),
    ({"rho": [1.0, "x"]}, "`rho[1]` to be a number, but got 'x'"),
    ({"rho": {}}, "`rho` to be a list, but got {}"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=range(len(WRONG)))
def test_a_record_of_wrong_types_is_one_line_with_file_and_field(tmp_path, fields, message):
    text = json.dumps(asdict(run()) | fields)
    with pytest.raises(ValueError, match=r"in the record here\.json") as caught:
        RunRecord.parse(text, "here.json")
    assert message in str(caught.value)


def test_records_keep_numbers_of_any_size(tmp_path):
    kept = run(curves={"actor/grad_norm": [[1], [1e300]], "val/avg@4": [[0], [float("nan")]]}, rho=[1e-30])
    kept.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path).curves["actor/grad_norm"] == [[1], [1e300]]


@pytest.mark.parametrize(
    "content", [b"", b"\xff{}", b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}", b"null", b"nan"]
)
def test_a_file_that_is_no_record_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*run\.json"):
        load_runs([tmp_path])


def test_a_folder_with_the_name_of_a_record_is_named(tmp_path):
    (tmp_path / "a" / "run.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no .*run\.json"):
        load_runs([tmp_path])


def test_records_of_older_versions_come_back_without_what_identifies_their_questions():
    for name in ("runs", "low"):
        found = load_runs([ROOT / "docs" / "findings" / f"{name}.jsonl"])
        assert len(found) > 20
        assert {len(run.data) for run in found} == {0}


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        load_runs([tmp_path])


def test_the_record_takes_what_studies_need_from_curves_and_answers(tmp_path):
    folder = tmp_path / "lr=1e-4" / "pgpo" / "seed=3"
    (folder / "validation").mkdir(parents=True)
    answers = folder / "validation" / "step=000002.jsonl"
    answers.write_text('{"avg": 0.333333333}\n{"avg": 1.0}\n')
    scalars = {"val/avg@4": {2: 0.66666}, "actor/grad_norm": {2: 1.0, 1: float("nan")}, "timing_s/step": {1: 9.0}}
    made = collect(folder, scalars, seed=3, steps=2, samples=4, seconds=1.0, cpu_seconds=1.0, rho=[1.5])
    assert (made.study, made.arm, made.rho) == ("lr=1e-4", "pgpo", [1.5])
    assert made.curves == {"val/avg@4": [[2], [0.66666]], "actor/grad_norm": [[2], [1.0]]}
    assert made.questions == {"2": [0.33333, 1.0]}
    assert made.data == {}  # the answers are of a version without hashes

    known = {"seed": 3, "steps": 2, "samples": 4, "seconds": 1.0, "cpu_seconds": 1.0}
    answers.write_text('{"avg": 0.5, "sha256": "a"}\n{"avg": 1.0, "sha256": "b"}\n')
    one = collect(folder, scalars, train="t", **known).data
    assert one == {"train": "t", "validation": joint_sha256(["a", "b"])}
    (folder / "validation" / "step=000004.jsonl").write_text(answers.read_text())
    assert collect(folder, scalars, train="t", **known).questions.keys() == {"2"}, "answers of an earlier run there"
    scalars["val/avg@4"] |= {4: 0.75, 6: 0.75}
    assert collect(folder, scalars, train="t", **known).data == one
    (folder / "validation" / "step=000006.jsonl").write_text(
        '{"avg": 0.5, "sha256": "a"}\n{"avg": 1.0, "sha256": "c"}\n'
    )
    assert collect(folder, scalars, **known).data["validation"] not in (one["validation"], joint_sha256(["a", "c"]))
