"""The probe's measurement, with an engine whose answers are known."""

import json

import pytest

from pgpo_lightning.commands.probe import save
from pgpo_lightning.probe.contexts import contexts
from pgpo_lightning.probe.measure import Prober
from pgpo_lightning.rollout.engine import Sampling
from tests.support.parrot import Parrot, probed, prober


def test_gaps_of_a_parrot(parrot):
    content = parrot
    rows = {made["name"]: made for made in content["contexts"]}
    assert content["student"]["score"]["value"] == 0.5
    nets = {name: made["net"]["value"] for name, made in rows.items()}
    # `careful` saves one sample of four. Without the answer the parrot is lost, with it it needs no steps.
    assert (nets["none"], nets["careful"], nets["sibling"], nets["sibling+feedback"]) == (0, 0.25, 0.5, 0.5)
    assert (nets["answer"], nets["wrong"], nets["other"]) == (0.5, -0.5, -0.5)
    assert rows["feedback"]["coverage"] == 0.5
    assert rows["feedback"]["coverage_failed"] == 1
    assert rows["own"]["coverage_failed"] == 0
    assert rows["own"]["net_failed"]["value"] == 0
    assert rows["sibling"]["recovery"]["value"] == 1
    assert rows["sibling"]["net_failed"]["value"] == 0.5
    assert rows["answer"]["keeps"]["value"] == 1
    assert rows["other"]["keeps"]["value"] == -1
    assert rows["sibling"]["example"]["teacher_prompt"].count("Correct solution:") == 1
    assert rows["answer"]["example"]["teacher_response"].startswith("\\boxed{")


def test_rows_with_the_same_reprompt_are_samples_of_one_prompt(tmp_path):
    engine = Parrot()
    made = prober(tmp_path, engine)
    rows = made.student()
    assert engine.calls == [(i, 4) for i in range(4)]
    engine.calls.clear()
    sibling = contexts(["sibling"], {}, [], made.module.objective.teaching.builder)[1]
    made.teacher(sibling, rows)
    # both successes of a group have the same text, so all four rows have one reprompt
    assert sorted(engine.calls) == [(i, 4) for i in range(4)]


def test_nothing_that_was_computed_is_lost(tmp_path):
    whole = probed(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        probed(tmp_path / "cut", Parrot(stop_after=7))
    parts = sorted((tmp_path / "cut" / "parts").rglob("*.json"))
    assert parts
    engine = Parrot()
    again = probed(tmp_path / "cut", engine)
    strip = lambda content: json.dumps([{**r, "seconds": 0} for r in content["contexts"]])  # noqa: E731
    assert strip(again) == strip(whole)
    total = Parrot()
    probed(tmp_path / "count", total)
    assert 0 < len(engine.calls) < len(total.calls)
    idle = Parrot()
    probed(tmp_path / "cut", idle)
    assert idle.calls == []
    assert not list((tmp_path / "cut").rglob("*.partial"))


def test_parts_with_the_earlier_name_of_the_hash_are_used(tmp_path):
    probed(tmp_path)
    for part in tmp_path.rglob("parts/**/*.json"):
        part.write_text(part.read_text().replace('"question_columns_sha256"', '"questions_sha256"'))
    idle = Parrot()
    probed(tmp_path, idle)
    assert idle.calls == []


def test_parts_of_another_probe_are_not_used(tmp_path):
    probed(tmp_path)
    with pytest.raises(
        ValueError, match=r"student.0000.json to be made with the settings of this probe, but `precision`"
    ):
        probed(tmp_path, precision="bf16-mixed")
    made = prober(tmp_path, Parrot())
    changed = contexts([], {"careful": "{prompt}!!!"}, [], made.module.objective.teaching.builder)[1]
    with pytest.raises(ValueError, match=r"but `context\.reprompt_template` differ"):
        made.teacher(changed, made.student())
    with pytest.raises(ValueError, match="but `question_columns_sha256`, `questions` differ"):
        prober(tmp_path, Parrot(), count=5).student()
    asked = [one for chunk in made.chunks for one in chunk]
    asked[0].columns["keywords"] = "which only the verifier reads"
    again = Prober(made.module, asked, 4, Sampling(12), 2, 5, tmp_path, {"split": "validation"})
    with pytest.raises(ValueError, match="but `question_columns_sha256` differ"):
        again.student()
    part = tmp_path / "parts" / "student" / "0000.json"
    for text in (part.read_text()[:100], "[]"):
        part.write_text(text)
        with pytest.raises(ValueError, match=r"student.0000.json to be a part of a probe, but .* Delete it"):
            made.student()


def test_the_report_of_a_probe(parrot, tmp_path, capsys):
    save(parrot, tmp_path)
    text = (tmp_path / "probe.md").read_text()
    assert (
        "| sibling | 1.00 (1.00) | 1.000 | +0.500 ± 0.000 | +0.500 ± 0.000 | +0.500 ± 0.000 | 1.000 (+1.000 ± 0.000) |"
        in text
    )
    assert "`other`: -100% [-100%, -100%] of the net gap of `sibling`" in text
    assert (tmp_path / "probe.png").stat().st_size > 5000
    assert json.loads((tmp_path / "probe.json").read_text())["settings"]["samples"] == 4
    assert "Largest net gap: feedback" in capsys.readouterr().out
