"""Answers of the untrained model that runs share: equal to sampled ones, and not found where anything else is asked."""

import copy

import pytest
import torch

from pgpo_lightning.core.types import Question
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.training.base_answers import BaseAnswers, hash_of_model
from tests.support.helpers import TOKENIZER, tiny_model

QUESTIONS = [Question("1+1=", "2", index=0), Question("2+3=", "5", index=1)]
PROMPTS = [TOKENIZER("1+1=").input_ids, TOKENIZER("2+3=").input_ids]
SAMPLING = Sampling(6, 0.7, 0.9, seeds=[3, 4])


class Counted:
    """The sampling of an engine, which counts its calls."""

    def __init__(self, engine):
        self.engine, self.calls = engine, 0

    def __call__(self, model, questions, prompts, n, sampling):
        self.calls += 1
        return self.engine.generate(model, TOKENIZER, questions, prompts, n, sampling)


def evaluate(folder, model=None, prompts=PROMPTS, n=3, sampling=SAMPLING, engine=None, tokenizer=TOKENIZER):
    """The rollouts, and whether they were sampled."""
    model, engine = model or tiny_model(), engine or TransformersEngine()
    answers, generate = BaseAnswers(folder, engine, tokenizer), Counted(engine)
    answers.start()
    assert answers.covers(0)
    rollouts = answers.generate(generate, model, QUESTIONS, prompts, n, sampling)
    assert answers.found == 1 - generate.calls
    return rollouts, bool(generate.calls)


def plain(rollouts):
    return [
        (r.question.index, r.prompt_ids, r.response_ids, r.log_probs.tolist(), r.log_probs.dtype, r.text, r.finished)
        for r in rollouts
    ]


def test_what_is_read_is_what_was_sampled(tmp_path):
    sampled, first = evaluate(tmp_path)
    read, second = evaluate(tmp_path)
    assert (first, second) == (True, False)
    assert plain(read) == plain(sampled)
    assert len(list(tmp_path.iterdir())) == 1, "no partial file is left"
    other = QUESTIONS[0].index  # the questions are those of the reader, whose columns its verifier may need
    assert read[0].question is QUESTIONS[other]


def moved(name="lm_head.weight"):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-7 + model.get_parameter(name).view(-1)[-1].abs() * 1e-6
    return model


def with_template():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def with_end():
    model = tiny_model(tie_word_embeddings=False)
    model.generation_config.eos_token_id = [3, 4]
    return model


CHANGES = {
    "weights": lambda: {"model": moved()},
    "weights of a norm": lambda: {"model": moved("model.norm.weight")},
    "type of the weights": lambda: {"model": tiny_model(tie_word_embeddings=False).bfloat16()},
    "configuration": lambda: {"model": tiny_model(tie_word_embeddings=False, rope_theta=5.0)},
    "end tokens": lambda: {"model": with_end()},
    "seed": lambda: {"sampling": Sampling(6, 0.7, 0.9, seeds=[3, 5])},
    "samples": lambda: {"n": 2},
    "temperature": lambda: {"sampling": Sampling(6, 0.71, 0.9, seeds=[3, 4])},
    "top-p": lambda: {"sampling": Sampling(6, 0.7, 0.91, seeds=[3, 4])},
    "length": lambda: {"sampling": Sampling(5, 0.7, 0.9, seeds=[3, 4])},
    "prompts": lambda: {"prompts": [PROMPTS[0], [*PROMPTS[1], 7]]},
    "order of the batch": lambda: {"prompts": PROMPTS[::-1]},
    "engine": lambda: {"engine": TransformersEngine(max_sequences=2)},
    "tokenizer": lambda: {"tokenizer": with_template()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_part_of_the_key_misses(tmp_path, change):
    given = {"model": tiny_model(tie_word_embeddings=False)}
    assert evaluate(tmp_path, **given)[1]
    assert evaluate(tmp_path, **(given | CHANGES[change]()))[1], "sampled"
    assert not evaluate(tmp_path, **given)[1]


@pytest.mark.parametrize("what", ["_code", "_packages", "threads", "default dtype", "autocast", "products"])
def test_another_circumstance_misses(tmp_path, what, monkeypatch):
    model = tiny_model()
    answers = BaseAnswers(tmp_path, TransformersEngine(), TOKENIZER)
    before = answers._key(model, PROMPTS, 3, SAMPLING)
    assert before == answers._key(model, PROMPTS, 3, SAMPLING)
    if what in ("_code", "_packages"):
        monkeypatch.setattr(f"pgpo_lightning.training.base_answers.{what}", lambda: {"torch": "0"})
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    if what == "default dtype":
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    if what == "products":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with torch.autocast("cpu", enabled=what == "autocast"):
        assert answers._key(model, PROMPTS, 3, SAMPLING) != before


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"[]\n[]"])
def test_a_damaged_file_is_written_anew(tmp_path, damage):
    sampled, _ = evaluate(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="ignored and written anew"):
        again, anew = evaluate(tmp_path)
    assert anew
    assert plain(again) == plain(sampled)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_costs_no_evaluation(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="`evaluation.base_answers` to a folder that can be written to"):
        rollouts, sampled = evaluate(tmp_path / "file" / "base")
    assert sampled
    assert len(rollouts) == 6


def test_weights_are_hashed_in_every_evaluation(tmp_path):
    model, engine = tiny_model(), TransformersEngine()
    answers, generate = BaseAnswers(tmp_path, engine, TOKENIZER), Counted(engine)
    for calls in (1, 2):
        answers.start()
        answers.generate(generate, model, QUESTIONS, PROMPTS, 2, SAMPLING)
        assert generate.calls == calls
        model.lm_head.weight.data.mul_(1.001)  # which no version counter of a tensor notices


class Own(TransformersEngine):
    """An engine of a user, which may do anything before it samples."""


def test_when_it_is_used(tmp_path):
    answers = BaseAnswers(tmp_path, TransformersEngine(), TOKENIZER)
    assert not answers.covers(0), "no evaluation is under way"
    answers.start()
    assert answers.covers(0)
    assert not answers.covers(1)
    answers.stop()
    assert not answers.covers(0)
    own = BaseAnswers(tmp_path, Own(), TOKENIZER)
    own.start()
    assert not own.covers(0)


def test_equal_models_have_equal_hashes():
    assert hash_of_model(tiny_model()) == hash_of_model(tiny_model())
    assert hash_of_model(tiny_model()) != hash_of_model(tiny_model(seed=1))
    assert hash_of_model(tiny_model()) != hash_of_model(tiny_model().bfloat16())
