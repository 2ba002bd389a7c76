"""Evaluation: scores are those of the samples, random numbers repeat, nothing leaks into training."""

import json
import random

import pytest
import torch
from helpers import LIMITS, TOKENIZER, loader, questions, tiny_model, trainer
from lightning.pytorch.loggers import TensorBoardLogger

from pgpo_lightning.modules import SDPO
from pgpo_lightning.records import Verdict


def letter(question, response):
    """Right if the response has an even number of characters; votes for its parity."""
    return Verdict(float(len(response) % 2 == 0), answer=str(len(response) % 2))


def evaluate(folder, verifier=letter, batch=2, **settings):
    module = SDPO(tiny_model(), verifier, tokenizer=TOKENIZER, eval_samples=5, **(LIMITS | settings))
    t = trainer(folder, logger=TensorBoardLogger(folder, name="", version=""))
    scores = t.validate(module, loader(questions(6), batch), verbose=False)[0]
    lines = (folder / "validation" / "step=000000.jsonl").read_text().splitlines()
    return scores, [json.loads(line) for line in lines], module


def test_scores_are_those_of_the_answers_in_the_file(tmp_path):
    scores, answers, _ = evaluate(tmp_path)
    assert len(answers) == 6
    average = sum(sum(a["rewards"]) / 5 for a in answers) / 6
    assert 0.2 < average < 0.8
    assert scores["val/avg@5"] == pytest.approx(average)
    assert scores["val/pass@5"] == pytest.approx(sum(max(a["rewards"]) for a in answers) / 6)
    majority = [float(a["answers"].count("0") > 2) for a in answers]
    assert scores["val/maj@5"] == pytest.approx(sum(majority) / 6)
    assert scores["val/length"] == pytest.approx(sum(sum(a["lengths"]) for a in answers) / 30)
    assert scores["val/cut_off"] == pytest.approx(sum(not f for a in answers for f in a["finished"]) / 30)
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
    module = SDPO(tiny_model(), letter, tokenizer=TOKENIZER, eval_samples=3, **LIMITS)
    asked = questions(20)
    for i, question in enumerate(asked):
        question.index = 3 * i  # as if others had been dropped
    found = []
    for size in (1, 3, 20):
        trainer(tmp_path).validate(module, loader(asked[::order], size), verbose=False)
        found.append((tmp_path / "validation" / "step=000000.jsonl").read_text())
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
    assert "val/maj@5" not in scores
    assert scores["val/avg@5"] == 1.0


def test_only_the_student_is_loaded_where_nothing_is_trained(tmp_path):
    _, _, module = evaluate(tmp_path)
    assert module.teacher is None


def test_validation_does_not_change_training(tmp_path):
    """It draws from generators of its own, and puts the model back into training mode."""
    states = []
    for every in (None, 1):
        module = SDPO(tiny_model(), letter, tokenizer=TOKENIZER, num_generations=4, eval_samples=3,
                      optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **LIMITS)  # fmt: skip
        t = trainer(tmp_path, max_steps=3, val_check_interval=every, limit_val_batches=1.0 if every else 0)
        t.fit(module, loader(questions(6), 2), loader(questions(4), 2) if every else None)
        states.append([p.detach().clone() for p in module.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
