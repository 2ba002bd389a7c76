"""A module that is built again from a checkpoint, the settings beside a log, and answers to questions without a verdict."""

import json
from argparse import ArgumentError
from dataclasses import replace

import pytest
import torch
import yaml

from pgpo_lightning import GRPO, SDPO, EvaluationConfig, RepromptConfig, TeacherConfig, UpdateConfig
from pgpo_lightning.commands.main import main
from pgpo_lightning.rewards import BoxedAnswer
from tests.support.helpers import config, loader, questions, trainer


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


def test_a_run_of_the_command_line_is_loaded_with_its_settings(tmp_path):
    main(["fit", "--config", config(tmp_path / "run", steps=1, model={"teacher_update_rate": 0.2})])
    (path,) = (tmp_path / "run").glob("**/step=000001.ckpt")
    module = SDPO.load_from_checkpoint(path)
    assert module.steps == 1
    assert module.objective.teaching.config == TeacherConfig(update_rate=0.2)
    assert isinstance(module.actor.verifier, BoxedAnswer)
    assert equal(torch.load(path, weights_only=True)["state_dict"], module.state_dict())
    settings = yaml.safe_load(next((tmp_path / "run").glob("**/hparams.yaml")).read_text())
    assert (settings["teacher"]["update_rate"], settings["evaluation"]["samples"]) == (0.2, 2)


def test_a_module_of_python_is_loaded_with_what_has_no_text_given_again(tmp_path):
    given = {"max_prompt_length": 64, "max_response_length": 12, "num_generations": 4, "seed": 5}
    groups = {
        "reprompt": RepromptConfig(max_reprompt_len=160),
        "update": UpdateConfig(max_grad_norm=None),
        "evaluation": EvaluationConfig(samples=2),
    }
    module = SDPO("toy", lambda question, response: 1.0, **given, **groups)
    t = trainer(tmp_path, max_steps=1)
    t.fit(module, loader(questions(2)))
    t.save_checkpoint(tmp_path / "one.ckpt")
    again = SDPO.load_from_checkpoint(tmp_path / "one.ckpt", verifier=BoxedAnswer())
    assert (again.update, again.seed, again.evaluator.config) == (groups["update"], 5, groups["evaluation"])
    assert equal(module.state_dict(), again.state_dict())
    with pytest.raises(ArgumentError, match="verifier"):
        SDPO.load_from_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ArgumentError, match=r"not accept option 'divergence\.alpha'"):
        GRPO.load_from_checkpoint(tmp_path / "one.ckpt", verifier=BoxedAnswer())


def test_predictions_are_answers_without_a_verdict_where_no_answer_is_known(tmp_path):
    def verifier(question, response):
        raise AssertionError("nobody asked for a verdict")

    limits = {"max_prompt_length": 64, "max_response_length": 12, "reprompt": RepromptConfig(max_reprompt_len=160)}
    module = SDPO("toy", verifier, evaluation=EvaluationConfig(samples=3), seed=1, **limits)
    asked = [replace(question, answer=None) for question in questions(4)]
    batches = [trainer(tmp_path).predict(module, loader(asked, size)) for size in (2, 4)]
    answers, others = ([answer for batch in each for answer in batch] for each in batches)
    assert answers == others  # whatever the size of the batches
    assert [answer["prompt"] for answer in answers] == [question.prompt for question in questions(4)]
    for answer in answers:
        assert len(answer["responses"]) == len(answer["lengths"]) == len(answer["finished"]) == 3
        assert all(1 <= length <= 12 for length in answer["lengths"])
    json.dumps(answers)
    assert module.teacher is None
