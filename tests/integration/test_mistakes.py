"""Mistakes on the command line and in configurations: one short message that says what was meant, and the same exit status."""

import pytest

from pgpo_lightning.commands.main import main, program
from pgpo_lightning.commands.mistakes import explained
from pgpo_lightning.core.errors import MOST_LINES, UserError, error_report
from tests.support.helpers import config

OPTIONS = [
    ("--model.num_generation 4", "a setting of SDPO, but got `model.num_generation`. Did you mean `model.num_generations`?"),
    ("--model.weight abc", "`model.weight`. Did you mean `model.token_weights`, `model.question"),
    ("--model.entry_clip 0.5", "Expected `model.divergence.entry_clip`, where `entry_clip` stands now. Write it there."),
    ("--model.add_tail true", "`model.add_tail`. Did you mean `model.divergence.distillation_add_tail`?"),
    ("--model.cap 2", "Expected a setting of SDPO, but got `model.cap`.\n"),
    ("--model.evaluation.smaples 4", "`model.evaluation.smaples`. Did you mean `model.evaluation.samples`?"),
    ("--model.success_threshold 1", "`model.success_threshold`. Did you mean `model.reward.success_threshold`?"),
    (
        "--model.update.steps_per_batch 2",
        "which is computed from `model.update.updates_per_batch` and `model.update.num_iterations`. Set these.",
    ),
    ("--model.num_generations abc", "Expected `model.num_generations` to be a whole number, but got abc."),
    ("--model.reward.on_error zer", "Expected `model.reward.on_error` to be raise or zero, but got zer."),
    ("--model.optimizer.lrr 3", "a setting of AdamW, but got `model.optimizer.lrr`. Did you mean `model.optimizer.lr`?"),
    ("--model SDP", "Expected `model` to be a class or its import path, but got SDP. Did you mean `SDPO`?"),
    ("--model.engine TransformersEngin", "got TransformersEngin. Did you mean `TransformersEngine`?"),
    ("--model.optimizer AdamWW", "got AdamWW. Did you mean `AdamW`"),
    ("--model.scheduler OneCycleL", "got OneCycleL. Did you mean `OneCycleLR`?"),
    ("--data ToyArithmetik", "Expected `data` to be a class or its import path, but got ToyArithmetik. Did you mean `ToyAr"),
    ("--data.batch_sise 4", "a setting of ToyArithmetic, but got `data.batch_sise`. Did you mean `data.batch_size`"),
    ("--multiplier InformationMultiplyer", "got InformationMultiplyer. Did you mean `InformationMultiplier`"),
    ("--multiplier.hihg 2", "a setting of RandomMultiplier, but got `multiplier.hihg`. Did you mean `multiplier.high`?"),
    ("--multiplier.high abc", "Expected `multiplier.high` to be a number, but got abc."),
    ("--model mymodul.Own", "no module `mymodul`, which is neither in {cwd} nor installed. Did you mean `mymodule`?"),
    ("--model.verifier mymodule.chek", "module `mymodule` has no `chek`. Did you mean `check`?"),
    ("--trainr.max_steps 3", "Expected a setting, but got `trainr.max_steps`. Did you mean `trainer.max_steps`?"),
    ("--trainer.max_stps 3", "got `trainer.max_stps`. Did you mean `trainer.max_steps`"),
    ("--num_generations 4", "Expected a setting, but got `num_generations`. Did you mean `model.num_generations`?"),
    ("--trainer.max_steps abc", "Expected `trainer.max_steps` to be a whole number, but got abc."),
    ("--trainer.logger CSVLoger", "or its import path, but got CSVLoger. Did you mean `CSVLogger`?"),
    ("--config quickstrat", "or a name that `pgpo configs` lists, but got {cwd}/quickstrat. Did you mean `quickstart`?"),
    ("--model.update.updates_per_batch", "Expected a value after `--model.update.updates_per_batch`, but there is none."),
    ("fitt", "Expected settings as `--name value`, but got fitt."),
]  # fmt: skip


def said(capsys, words):
    """The message, after what every one must hold."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) <= MOST_LINES
    for noise in ("NestedArg", "Union", "<class", "usage", "Namespace", "class_path"):
        assert noise not in text
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mymodule.py").write_text("def check(question, response):\n    return 1.0\n")
    return tmp_path


@pytest.mark.parametrize(("option", "expected"), OPTIONS, ids=[option for option, _ in OPTIONS])
def test_a_mistake_is_one_message_with_what_was_meant(folder, capsys, option, expected):
    text = said(capsys, ["fit", "--config", config(folder / "run"), *option.split()])
    assert expected.format(cwd=folder) in text


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("model:\n  init_args:\n    num_generation: 4\n", "`model.num_generation` (my.yaml, line 3). Did you mean"),
        ("model: {init_args: {update: {micro_batch_token: 4}}}", "`model.update.micro_batch_token` (my.yaml, line 1)"),
        ("trainer:\n  max_stps: 3\n", "`trainer.max_stps` (my.yaml, line 2). Did you mean `trainer.max_steps`"),
        ("trainr: {max_steps: 3}", "`trainr.max_steps` (my.yaml, line 1). Did you mean `trainer.max_steps`?"),
        ("# A\nmodel:\n  class_path: SDP\n", "but got SDP (my.yaml, line 2). Did you mean `SDPO`?"),
        ("model: {init_args: {num_generations: abc}}", "to be a whole number, but got abc (my.yaml, line 1)."),
    ],
)
def test_a_mistake_in_a_file_is_found_by_its_line(folder, capsys, yaml, expected):
    (folder / "my.yaml").write_text(yaml)
    assert expected in said(capsys, ["fit", "--config", config(folder / "run"), "--config", "my.yaml"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["report", "runs", "--outptu", "x"], "got `outptu`. Did you mean `output`?\n`pgpo report --help` lists all"),
        (["report", "runs", "--margin", "abc"], "Expected `margin` to be a number or null, but got abc."),
        (["guard", "runs", "--belo.x", "1"], "Expected a setting, but got `belo.x`."),
        (["ablate", "--confg", "x"], "Expected a setting, but got `confg`. Did you mean `config`?"),
        (["export", "a", "b", "--weights", "studnet"], "Expected `weights` to be student or teacher, but got studnet."),
        (["plan", "--data.batch_sise", "4"], "`data.batch_sise`"),
    ],
)
def test_every_command_reports_mistakes_in_the_same_way(folder, capsys, words, expected):
    assert expected in said(capsys, words)


def test_user_errors_end_the_program_with_2(folder, capsys, monkeypatch):
    for words in (["--model.num_generation", "4"], ["--model.divergence.alpha", "1.5"]):
        monkeypatch.setattr("sys.argv", ["pgpo", "fit", "--config", config(folder / "run"), *words])
        with pytest.raises(SystemExit) as end:
            program()
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: Expected ")


def test_what_is_not_recognised_is_short_all_the_same():
    text = 'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Errors:\n' + "".join(
        f"    - reason {i} of NestedArg(key='a', val='b')\n" for i in range(20)
    )
    lines = explained(text, [], []).splitlines()
    assert lines[0] == "Expected `model` to be valid, but: reason 0 of a: 'b'"
    assert len(lines) <= MOST_LINES
    assert len(error_report(UserError("x\n" * 20), None).splitlines()) == MOST_LINES


def test_what_max_steps_counts_is_printed_where_a_batch_has_several(folder, capsys):
    settings = config(folder / "run", steps=4, multiplier=None)
    quick = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    main(["fit", "--config", settings, *quick, "--model.update.updates_per_batch", "2"])
    out = capsys.readouterr().out
    assert "trainer.max_steps counts optimizer steps: 4 are 2 batches, because `update` makes 2 of each." in out
