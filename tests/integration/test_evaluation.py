"""Evaluation: scores are those of the samples, random numbers repeat, nothing leaks into training."""

import hashlib
import json
import random
import statistics

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from pgpo_lightning.commands.main import main
from pgpo_lightning.core.identity import joint_sha256, question_sha256, training_sha256
from pgpo_lightning.core.types import Verdict
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support.helpers import LIMITS, TOKENIZER, build, config, loader, questions, tiny_model, trainer


def letter(question, response):
    """Right if the response has an even number of characters; votes for its parity."""
    return Verdict(float(len(response) % 2 == 0), answer=str(len(response) % 2))


def evaluate(folder, verifier=letter, batch=2, **settings):
    module = build(SDPO, tiny_model(), verifier, tokenizer=TOKENIZER, eval_samples=5, **(LIMITS | settings))
    t = trainer(folder, logger=TensorBoardLogger(folder, name="", version=""))
    scores = t.validate(module, loader(questions(6), batch), verbose=False)[0]
    lines = module.evaluator.held_out.path.read_text().splitlines()
    return scores, [json.loads(line) for line in lines], module


def test_scores_are_those_of_the_answers_in_the_file(tmp_path):
    scores, answers, _ = evaluate(tmp_path)
    assert len(answers) == 6
    average = sum(sum(a["rewards"]) / 5 for a in answers) / 6
    assert 0.2 < average < 0.8
    assert scores["validate/avg@5"] == pytest.approx(average)
    assert scores["validate/pass@5"] == pytest.approx(sum(max(a["rewards"]) for a in answers) / 6)
    majority = [float(a["answers"].count("0") > 2) for a in answers]
    assert scores["validate/maj@5"] == pytest.approx(sum(majority) / 6)
    assert scores["validate/length"] == pytest.approx(sum(sum(a["lengths"]) for a in answers) / 30)
    assert scores["validate/cut_off"] == pytest.approx(sum(not f for a in answers for f in a["finished"]) / 30)
    passed = [max(a["rewards"]) for a in answers]
    for name, each in (("avg", [a["avg"] for a in answers]), ("pass", passed), ("maj", majority)):
        assert scores[f"validate_standard_error/{name}@5"] == pytest.approx(statistics.stdev(each) / 6**0.5)
    for a in answers:
        assert a["rewards"] == [float(len(text) % 2 == 0) for text in a["responses"]]


def test_evaluation_repeats_itself_and_depends_on_the_seed(tmp_path):
    first = evaluate(tmp_path / "a")[1]
    again = evaluate(tmp_path / "b")[1]
    other = evaluate(tmp_path / "c", seed=1)[1]
    assert first == again
    assert [a["responses"] for a in first] != [a["responses"] for a in other]


@pytest.mark.parametrize("order", [1, -1])
def test_every_batch_size_and_order_give_the_same_answers(tmp_path, order):
    """The shortest and the longest prompts come together, or not: padding differs too."""
    module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, eval_samples=3, **LIMITS)
    asked = questions(20)
    for i, question in enumerate(asked):
        question.index = 3 * i  # as if others had been dropped
    found = []
    for size in (1, 3, 20):
        trainer(tmp_path).validate(module, loader(asked[::order], size), verbose=False)
        found.append(module.evaluator.held_out.path.read_text())
    assert found[0] == found[1] == found[2]


class Whimsical:
    """A verifier that draws."""

    def __call__(self, question, response):
        return random.random() + torch.rand(1).item()


def test_a_verifier_that_draws_is_the_same_in_every_batch(tmp_path):
    rewards = [[a["rewards"] for a in evaluate(tmp_path / str(b), Whimsical(), batch=b)[1]] for b in (1, 2, 6)]
    assert rewards[0] == rewards[1] == rewards[2]
    assert len({reward for row in rewards[0] for reward in row}) == 30


def test_without_answers_there_is_no_majority(tmp_path):
    scores, _, _ = evaluate(tmp_path, verifier=lambda question, response: 1.0)
    assert "validate/maj@5" not in scores
    assert scores["validate/avg@5"] == 1.0


def test_questions_that_scores_would_take_for_one_are_refused(tmp_path):
    module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, eval_samples=2, **LIMITS)
    asked = questions(3)
    asked[2].index = 0
    for size in (3, 1):
        with pytest.raises(ValueError, match="questions with different `index`"):
            trainer(tmp_path).validate(module, loader(asked, size), verbose=False)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]


def test_a_text_that_utf_8_has_no_place_for_is_kept(tmp_path):
    asked = questions(2)
    asked[0].answer, asked[1].answer = "\ud800", {1, 2}
    module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, eval_samples=2, **LIMITS)
    trainer(tmp_path).validate(module, loader(asked, 2), verbose=False)
    lines = module.evaluator.held_out.path.read_text().splitlines()
    assert [json.loads(line)["gold"] for line in lines] == ["\ud800", [1, 2]]


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_validate_and_test_leave_the_record_of_training_as_it_was(tmp_path, capsys):
    """After a fit, of the base model, of other questions, and between an interruption and its end."""
    settings = config(tmp_path / "whole", steps=4)
    main(["fit", "--config", settings])
    folder = tmp_path / "cut"
    there = ["--config", settings, "--trainer.default_root_dir", str(folder)]
    main(["fit", *there, "--trainer.max_steps", "2"])
    before = hashes(folder)
    last = ["--ckpt_path", str(folder / "checkpoints" / "step=000002.ckpt")]
    variants = [["validate", *last], ["validate"], ["validate", *last, "--data.limit_val", "3"], ["test", *last]]
    for number, (command, *more) in enumerate(variants, start=1):
        capsys.readouterr()
        main([command, *there, "--trainer.limit_test_batches", "1", *more])
        assert {path: sha for path, sha in hashes(folder).items() if path in before} == before
        made = sorted(set(hashes(folder)) - set(before))
        assert {path.parent.name for path in made} == {command}
        record = json.loads(next(path for path in made if path.suffix == ".json").read_text())
        assert record["command"] == command
        assert record["step"] == (2 if more else 0)
        assert (record["checkpoint"] is None) == (not more)
        answers = next(path for path in made if path.suffix == ".jsonl").read_text().splitlines()
        assert len(answers) == record["questions"]
        assert (
            f"avg@2 {record['scores']['avg']:.3f} ± {record['standard_errors']['avg']:.3f}" in capsys.readouterr().out
        )
        before = hashes(folder)
        assert len(made) == 2, f"number {number} wrote over another"
    first = (folder / "validation" / "step=000002.jsonl").read_text()
    again = next((folder / "validate").glob("step=000002-*.jsonl"))
    assert first in {path.read_text() for path in again.parent.glob("step=000002-*.jsonl")}, "the same answers"
    main(["fit", *there, *last])
    whole, cut = RunRecord.load(tmp_path / "whole"), RunRecord.load(folder)
    assert cut.questions == whole.questions
    assert cut.data == whole.data
    asked = [ToyArithmetic().load("train")[:13], ToyArithmetic().load("validation")[:8]]
    assert whole.data == {
        "train": training_sha256(asked[0]),
        "validation": joint_sha256(map(question_sha256, asked[1])),
    }
    assert {tag: curve for tag, curve in cut.curves.items() if tag.startswith("val/")} == {
        tag: curve for tag, curve in whole.curves.items() if tag.startswith("val/")
    }


def test_a_trial_run_writes_no_answers(tmp_path):
    (tmp_path / "validation").mkdir()
    kept = tmp_path / "validation" / "step=000000.jsonl"
    kept.write_text("of another run")
    main(["fit", "--config", config(tmp_path / "run", steps=1), "--trainer.default_root_dir", str(tmp_path),
          "--trainer.fast_dev_run", "1"])  # fmt: skip
    assert kept.read_text() == "of another run"


def test_only_the_student_is_loaded_where_nothing_is_trained(tmp_path):
    _, _, module = evaluate(tmp_path)
    assert module.teacher is None


def test_validation_does_not_change_training(tmp_path):
    """It draws from generators of its own, and puts the model back into training mode."""
    states = []
    for every in (None, 1):
        module = build(SDPO, tiny_model(), letter, tokenizer=TOKENIZER, num_generations=4, eval_samples=3,
                      optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **LIMITS)  # fmt: skip
        t = trainer(tmp_path, max_steps=3, val_check_interval=every, limit_val_batches=1.0 if every else 0)
        t.fit(module, loader(questions(6), 2), loader(questions(4), 2) if every else None)
        states.append([p.detach().clone() for p in module.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
