"""Rules and predictions that are fixed before the first run, and what a report says of them."""

import json
from dataclasses import replace

import pytest

from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.decisions import differences
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import two_way
from pgpo_lightning.studies.predictions import Prediction, seen
from pgpo_lightning.studies.registration import FILE, as_json, judged_by, outcome, read, register, registrations
from pgpo_lightning.studies.report_text import markdown
from pgpo_lightning.studies.sequential import SequentialPlan
from tests.support.studies import runs
from tests.unit.studies.test_spec import spec

PREDICTION = {
    "arm": "pgpo-8",
    "against": "sdpo",
    "condition": "base",
    "sign": "+",
    "size": 0.02,
    "interval": [0.0, 0.04],
    "reason": "a prototype with other seeds",
}
DESIGN = Design(draws=0)


def written(tmp_path, **changes):
    study = replace(spec(tmp_path, predictions=[PREDICTION], **changes), folder=tmp_path / "study")
    register(study, begun=0)
    return study


def predicted(sign="+", size=0.1, interval=None):
    return Prediction("pgpo-1.0", "sdpo", "lr=1", sign, size, "why not", interval=interval)


def test_the_file_holds_rules_hash_and_time(tmp_path):
    written(tmp_path, sequential={"looks": [5, 10]}, design={"margin": 0.05, "measures": ["final"]})
    (found,) = read(tmp_path / "study" / FILE)
    assert found.predictions == (Prediction(**PREDICTION | {"interval": (0.0, 0.04)}),)
    assert (found.design.margin, found.design.measures, found.sequential) == (0.05, ("final",), SequentialPlan((5, 10)))
    assert (len(found.sha256), found.runs_before, found.intact) == (64, 0, True)
    assert found.time.endswith("+00:00")
    assert as_json(found) == json.loads((tmp_path / "study" / FILE).read_text())[0]


def test_the_hash_is_that_of_the_rules_alone(tmp_path):
    study = written(tmp_path)
    (first,) = read(tmp_path / "study" / FILE)
    (tmp_path / "study" / FILE).unlink()
    register(study, begun=3)
    (second,) = read(tmp_path / "study" / FILE)
    assert first.sha256 == second.sha256
    assert second.runs_before == 3
    (tmp_path / "study" / FILE).unlink()
    register(replace(study, predictions=()), begun=0)
    assert read(tmp_path / "study" / FILE)[0].sha256 != first.sha256


def test_other_rules_are_refused_once_a_run_has_begun(tmp_path):
    study = written(tmp_path)
    before = (tmp_path / "study" / FILE).read_text()
    other = replace(study, sequential=SequentialPlan((5,)), design=Design(margin=0.1))
    with pytest.raises(
        ValueError, match=r"Expected `design`, `sequential` of the study to be as registered in .* on 20"
    ):
        register(other, begun=1)
    register(study, begun=1)
    assert (tmp_path / "study" / FILE).read_text() == before
    register(other, begun=0)
    assert read(tmp_path / "study" / FILE)[0].design.margin == 0.1


def test_a_file_that_was_edited_is_told(tmp_path):
    written(tmp_path)
    file = tmp_path / "study" / FILE
    content = json.loads(file.read_text())
    content[0]["predictions"][0]["size"] = 0.03
    file.write_text(json.dumps(content))
    assert not read(file)[0].intact
    file.write_text("[{}]")
    with pytest.raises(ValueError, match=r"Expected .*registration.json to hold the registration of a study"):
        read(file)


def test_a_report_judges_by_what_was_registered(tmp_path):
    written(tmp_path, sequential={"looks": [5, 10]}, design={"margin": 0.05})
    found = registrations([tmp_path / "study", tmp_path / "study" / "runs.jsonl"])
    assert len(found) == 1
    assert registrations([tmp_path]) == []
    assert judged_by(found) == (Design(margin=0.05), SequentialPlan((5, 10)))
    design, _ = judged_by(found, margin=0.1, measures=("final",))
    assert (design.margin, design.measures) == (0.1, ("final",))
    assert outcome(found[0], [], design)["changed"] == ["measures", "margin"]
    assert judged_by([]) == (Design(), None)
    other = replace(found[0], design=Design(margin=0.01))
    with pytest.raises(ValueError, match=r"one registered `margin`, but got 0.01 and 0.05. Report them one at a time"):
        judged_by([found[0], other])
    assert judged_by([found[0], other], margin=0.03)[0].margin == 0.03
    with pytest.raises(ValueError, match="the same looks"):
        judged_by([found[0], replace(found[0], sequential=None)])


def test_a_prediction_is_held_against_the_paired_difference():
    groups = conditions(runs(), DESIGN)
    arms = groups[0].arms
    mean = two_way(differences(arms["pgpo-1.0"], arms["sdpo"], ("final",))["final"])
    found = seen(predicted(size=0.1, interval=(0.05, 0.15)), groups)
    assert (found["value"], (found["low"], found["high"])) == (mean.value, mean.interval())
    assert (found["sign"], found["in_predicted"]) == (True, 0.05 <= mean.value <= 0.15)
    assert found["in_seen"] == (mean.interval()[0] <= 0.1 <= mean.interval()[1])
    assert seen(predicted("-", 0.5), groups)["sign"] is False
    assert seen(predicted("-", 0.5), groups)["in_seen"] is False
    assert seen(predicted("-", 0.5), groups)["in_predicted"] is None
    assert seen(predicted("0", 0), groups)["sign"] == (mean.interval()[0] <= 0)
    assert seen(replace(predicted(), condition="lr=2"), groups) is None
    assert seen(replace(predicted(), against="nobody"), groups) is None


def test_the_report_has_a_table_with_hash_and_time(tmp_path):
    arms = {"sdpo": {}, "pgpo-1.0": {}}
    rows = [
        {"arm": "pgpo-1.0", "against": "sdpo", "condition": "lr=1", "sign": sign, "size": size, "reason": why}
        for sign, size, why in (("+", 0.1, "planted"), ("-", 0.5, "mistaken"))
    ]
    study = spec(tmp_path, arms=arms, conditions={"lr=1": {}}, predictions=rows)
    register(replace(study, folder=tmp_path / "study"), begun=0)
    (found,) = registrations([tmp_path / "study"])
    content = analyse(runs(), DESIGN)
    content["registrations"] = [outcome(found, conditions(runs(), DESIGN), DESIGN)]
    text = markdown(content, {})
    assert f"fixed on {found.time}, before the first run (SHA-256 `{found.sha256}`)" in text
    assert "judges by other rules than were fixed: draws.**" in text
    assert "| lr=1 | pgpo-1.0 − sdpo | final | +0.100 | +0.1" in text
    assert "| -0.500 | +0.1" in text
    assert text.index("## Predicted and seen") < text.index("## lr=1")
    late = replace(found, runs_before=7, intact=False)
    content["registrations"] = [outcome(late, conditions(runs(), DESIGN), DESIGN)]
    text = markdown(content, {})
    assert "after 7 of the runs had begun, so nothing here was predicted" in text
    assert "its content does not have this hash" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign": "0"}, r"`size` to be 0 where `sign` is 0, and only there, but got 0 0.02, in `predictions\[0\]`"),
        ({"sign": "-"}, r"`interval` to contain the predicted -0.02, but got \[0.0, 0.04\], in `predictions\[0\]`"),
        ({"arm": "nobody"}, r"`predictions\[0\]` to name a condition and two of its arms, but there is no base/nobody"),
        ({"condition": "high"}, r"`predictions\[0\]` to name .* but there is no high/pgpo-8"),
        ({"reasons": "two"}, r"`predictions\[0\]` to be a mapping with the keys arm, against, .*interval"),
        ({"size": -1}, r"`size` to be at least 0, but got -1, in `predictions\[0\]`"),
    ],
)
def test_a_wrong_prediction_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        spec(tmp_path, predictions=[PREDICTION | change])


def test_wrong_entries_of_the_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`predictions` to be a list, but got"):
        spec(tmp_path, predictions={"a": 1})
    with pytest.raises(ValueError, match=r"`predictions\[0\]` to have `reason`, but got"):
        spec(tmp_path, predictions=[{key: value for key, value in PREDICTION.items() if key != "reason"}])
    with pytest.raises(ValueError, match=r"`margin` to be above 0, but got 0, in `design`"):
        spec(tmp_path, design={"margin": 0})
    with pytest.raises(ValueError, match="`sequential` to be a mapping with the keys looks, spending"):
        spec(tmp_path, sequential=[5, 10])
