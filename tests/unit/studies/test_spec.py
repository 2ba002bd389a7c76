"""A study's file, and the runs that it means."""

import datetime
import json
from pathlib import Path

import pytest
import yaml

from pgpo_lightning.studies.spec import StudySpec, leaves, merged, nested, read_study
from tests.support import ROOT

MULTIPLIER = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 8.0}}


def spec(tmp_path, **changes):
    (tmp_path / "base.yaml").write_text("")
    known = {
        "base": [str(tmp_path / "base.yaml")],
        "folder": "runs/study",
        "seeds": 2,
        "arms": {"sdpo": {"multiplier": None}, "pgpo-8": {"multiplier": MULTIPLIER}},
    }
    path = tmp_path / "study.yaml"
    content = {key: value for key, value in (known | changes).items() if value != "absent"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(path)


def test_a_study_is_every_arm_under_every_condition_with_every_seed(tmp_path):
    runs = spec(tmp_path, conditions={"low": {"model.init_args.lr": 0.1}, "high": None}, seeds=[4, 2]).runs()
    assert [run.name for run in runs] == [
        f"{condition}/{arm}/seed={seed}"
        for seed in (4, 2)
        for condition in ("low", "high")
        for arm in ("sdpo", "pgpo-8")
    ]
    assert runs[1].settings == {"model": {"init_args": {"lr": 0.1}}, "multiplier": MULTIPLIER}
    assert runs[2].settings == {"multiplier": None}
    assert runs[1].folder == Path("runs/study/low/pgpo-8/seed=4")
    assert runs[1].log == Path("runs/study/low/pgpo-8/seed=4.log")


def test_the_arguments_need_no_other_file_than_the_base(tmp_path):
    run = spec(tmp_path, seeds=[7], base_evaluation="own").runs()[1]
    words = run.arguments("--ckpt_path", "last")
    assert words[:4] == ["fit", "--config", str(tmp_path / "base.yaml"), "--config"]
    assert json.loads(words[4]) == {"multiplier": MULTIPLIER}
    assert words[5:] == [
        *("--seed_everything", "7", "--trainer.default_root_dir", "runs/study/base/pgpo-8/seed=7"),
        *("--ckpt_path", "last"),
    ]
    own = spec(tmp_path, arms={"as-it-is": None}, base_evaluation="own")
    assert own.runs()[0].arguments().count("--config") == 1


def test_runs_share_the_evaluation_of_the_base_model(tmp_path):
    """Arms that set it themselves keep what they set; `settings`, by which a started run is known, do not have it."""
    own = {"model.init_args.evaluation": {"base_answers": None, "samples": 3}}
    runs = spec(tmp_path, arms={"sdpo": {"multiplier": None}, "own": own}).runs()
    shared = {"model": {"init_args": {"evaluation": {"base_answers": "runs/study/base-answers"}}}}
    assert json.loads(runs[0].arguments()[4]) == shared | {"multiplier": None}
    assert runs[0].settings == {"multiplier": None}
    assert json.loads(runs[1].arguments()[4])["model"]["init_args"]["evaluation"] == {
        "base_answers": None,
        "samples": 3,
    }


def test_dots_and_nested_mappings_mean_the_same_and_later_layers_come_first():
    dotted = nested("x", {"a.b": {"c.d": 1}, "a.b.e": None})
    assert dotted == {"a": {"b": {"c": {"d": 1}, "e": None}}}
    assert list(leaves(dotted)) == [("a.b.c.d", 1), ("a.b.e", None)]
    assert merged(dotted, {"a": {"b": {"e": 2}}}, {"a": {"f": 3}}) == {"a": {"b": {"c": {"d": 1}, "e": 2}, "f": 3}}
    assert dotted["a"]["b"]["e"] is None


def test_names_of_the_command_line_reach_the_class_that_has_them(tmp_path):
    short = {
        "multiplier": "ConstantMultiplier",
        "multiplier.value": 1.05,
        "model.num_generations": 4,
        "model.init_args.teacher.regularization": "frozen",  # no class of the module
        "data": {"batch_size": 2},
    }
    constant = {"class_path": "ConstantMultiplier", "init_args": {"value": 1.05}}
    long = {
        "multiplier": constant,
        "model.init_args": {"num_generations": 4, "teacher.regularization": "frozen"},
        "data.init_args.batch_size": 2,
    }
    assert spec(tmp_path, arms={"a": short}).arms == spec(tmp_path, arms={"a": long}).arms
    assert spec(tmp_path, arms={"a": {"multiplier": "ConstantMultiplier"}}).arms["a"] == {
        "multiplier": "ConstantMultiplier"
    }


def test_settings_of_every_run_give_way_to_those_of_conditions_and_arms(tmp_path):
    study = spec(tmp_path, settings={"a": 1, "b": 1, "c": 1}, conditions={"low": {"b": 2}}, arms={"x": {"c": 3}})
    assert study.runs()[0].settings == {"a": 1, "b": 2, "c": 3}


def test_placeholders_become_folders_and_runs_wait_for_them(tmp_path):
    arms = {
        "constant": {"multiplier": {"init_args": {"run": "{run:pgpo-8}"}}},
        "replayed": {
            "multiplier.init_args": {"run": "x/{run:pgpo-8:next}/run.json", "seed": "{seed}", "name": "n{seed}"}
        },
        "pgpo-8": {},
    }
    runs = {run.name: run for run in spec(tmp_path, arms=arms, seeds=[5, 6], conditions={"low": {}}).runs()}
    constant = runs["low/constant/seed=5"]
    assert constant.settings["multiplier"]["init_args"]["run"] == "runs/study/low/pgpo-8/seed=5"
    assert constant.needs == ("low/pgpo-8/seed=5",)
    assert runs["low/pgpo-8/seed=5"].needs == ()
    for seed, other in ((5, 6), (6, 5)):
        replayed = runs[f"low/replayed/seed={seed}"]
        assert replayed.needs == (f"low/pgpo-8/seed={other}",)
        assert replayed.settings["multiplier"]["init_args"] == {
            "run": f"x/runs/study/low/pgpo-8/seed={other}/run.json",
            "seed": seed,
            "name": f"n{seed}",
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, r"but got `sedes`"),
        ({"arms": "absent"}, r"to have `arms`"),
        ({"base": "no/such.yaml"}, r"`base` config no/such\.yaml to exist"),
        ({"base": []}, "`base` to list"),
        ({"seeds": 0}, "`seeds` to be their number"),
        ({"seeds": [1, -1]}, "`seeds` to be their number"),
        ({"seeds": [1, 1]}, "every one of `seeds` once"),
        ({"processes": 0}, "`processes` to be at least 1"),
        ({"processes": -1}, "`processes` to be at least 1, but got -1"),
        ({"processes": 1.5}, "`processes` to be a whole number, but got 1.5"),
        ({"seeds": "3"}, "`seeds` to be their number or a list"),
        ({"seeds": [0, "1"]}, "`seeds` to be their number or a list"),
        ({"seeds": [2**40]}, r"`seeds\[0\]` to lie in"),
        ({"seeds": 10**9}, "`seeds` to be at most 10000"),
        ({"folder": 3}, "`folder` to be a text, but got 3"),
        ({"folder": " "}, "`folder` not to be empty"),
        ({"settings": {"a": datetime.date(2026, 1, 2)}}, "texts, numbers, lists and mappings, but .*date"),
        ({"processes": "two"}, "`processes` to be a whole number, but got 'two'"),
        ({"keep_checkpoints": 1}, "`keep_checkpoints` to be true or false, but got 1"),
        ({"base_evaluation": "both"}, "`base_evaluation` to be one of shared, own, but got 'both'"),
        ({"arms": {}}, "`arms` to map names"),
        ({"arms": {"a/b": {}}}, r"names in `arms`.*'a/b'"),
        ({"arms": {0.5: {}}}, r"in quotes.*0\.5"),
        ({"arms": {"a": 3}}, r"`arms\.a` to be a mapping of settings, but got 3"),
        ({"arms": {"a": {1: 2}}}, r"keys of `arms\.a`.*1"),
        ({"arms": {"a": {"x.y": 1, "x": {"y": 2}}}}, r"`arms\.a` to set everything once, but it sets `x\.y` twice"),
        ({"arms": {"a": {"x.y": 1, "x": None}}}, "sets `x` twice"),
        ({"arms": {"a": {"model.n": 1, "model.init_args.n": 2}}}, r"but got `model\.init_args\.n` twice"),
        ({"arms": {"a": {"m": {"run:b": None}}}}, r"quotes around the placeholder `\{run:b\}` in `arms\.a`"),
        ({"arms": {"a": {"seed_everything": 1}}}, "`arms.a` not to set `seed_everything`, which the study sets itself"),
        ({"settings": {"trainer": {"default_root_dir": "x"}}}, "`settings` not to set `trainer.default_root_dir`"),
        ({"conditions": {"c": {"ckpt_path": "x"}}}, "`conditions.c` not to set `ckpt_path`"),
        ({"conditions": {"c": {"x.y": 1}}, "arms": {"a": {"x": {"y": 2}}}}, r"condition c and arm a.*both set `x\.y`"),
        ({"conditions": {"c": {"x": None}}, "arms": {"a": {"x": {"y": 2}}}}, "both set `x`"),
        ({"arms": {"a": {"x": "{run:b}"}}}, r"`\{run:b\}` of base/a to name an arm, but the arms are a"),
        ({"arms": {"a": {"x": "{run:b:next}"}, "b": {}}, "seeds": [3]}, r"two seeds for `\{run:b:next\}`"),
        ({"arms": {"a": {"x": "{run:b}"}, "b": {"x": "{run:a}"}}}, "depend on one another: base/[ab]/seed=0 <- "),
        ({"arms": {"a": {"x": "{run:a:next}"}}}, "depend on one another"),
    ],
)
def test_what_cannot_be_is_refused_and_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        spec(tmp_path, **changes).runs()


def test_both_may_say_the_same(tmp_path):
    assert spec(tmp_path, conditions={"c": {"x.y": 1}}, arms={"a": {"x": {"y": 1, "z": 2}}}).runs()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no"),
        ("3", "settings of a study, but got 3"),
        ("a: [1", "study.yaml to be YAML in UTF-8, but .*line 1"),
        ("a: 2026-99-99", "study.yaml to be YAML in UTF-8, but month must be"),
        ("a: &a {b: *a}", "study.yaml to hold texts, numbers, lists and mappings, but .*[Cc]ircular"),
        ("? [1, 2]\n: 3", "study.yaml to be YAML|study.yaml to hold"),
        ("a: " + "[" * 5000, "study.yaml to be YAML in UTF-8"),
    ],
    ids=range(7),
)
def test_a_file_that_is_none_is_named(tmp_path, text, message):
    if text:
        (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "study.yaml")


def test_the_toy_study_asks_every_question():
    study = read_study(ROOT / "configs" / "studies" / "toy.yaml")
    assert isinstance(study, StudySpec)
    assert len(study.seeds) >= 10
    assert len(study.conditions) == 3
    assert {"sdpo", "pgpo-0.5", "pgpo-1.0", "pgpo-1.5", "pgpo-8"} <= set(study.arms)
    assert {f"{control}-8" for control in ("constant", "random", "shuffled", "replayed", "inverse")} <= set(study.arms)
    for run in study.runs():
        assert bool(run.needs) == (run.arm.split("-")[0] in ("constant", "random", "shuffled", "replayed", "inverse"))


def test_a_condition_may_have_some_of_the_arms_only(tmp_path):
    text = {
        "conditions": {"low": {"a.b": 1}, "high": {"a.b": 2}},
        "arms": {"one": {}, "two": {"multiplier.run": "{run:one}"}, "three": {"a.b": 1}},
        "only": {"high": ["two", "one"]},
        "seeds": 1,
    }
    study = spec(tmp_path, **text)
    assert [f"{run.condition}/{run.arm}" for run in study.runs()] == [
        "low/one",
        "low/two",
        "low/three",
        "high/one",
        "high/two",
    ]
    for only in ({"higher": ["one"]}, {"high": []}, {"high": ["four"]}):
        with pytest.raises(ValueError, match="`only` to map conditions to lists of arms"):
            spec(tmp_path, **text | {"only": only})
    with pytest.raises(ValueError, match="to name an arm, but the arms are two"):
        spec(tmp_path, **text | {"only": {"high": ["two"]}}).runs()
