"""HAPO's demonstrations: checked against the verifier, kept and named."""

import random

import pytest

from pgpo_lightning.core.types import Question
from pgpo_lightning.modules import HAPO
from pgpo_lightning.objectives.demonstrations import ColumnDemonstrations, Demonstration, SuccessBuffer
from tests.support.hapo import HAPO_LIMITS
from tests.support.helpers import TOKENIZER, build, half_right, questions, tiny_model


def accept(question, text):
    return Demonstration([1], 1.0) if "good" in text else "its reward is 0"


def rows(*texts):
    return [Question("?", "1", index=i, source=f"f:{i}", columns={"solution": text}) for i, text in enumerate(texts)]


def test_a_demonstration_that_the_verifier_refuses_is_dropped_and_named():
    source = ColumnDemonstrations()
    with pytest.warns(
        UserWarning, match="Dropped the demonstrations of 1 of 3 .* the first is that of f:1: its reward is 0"
    ):
        source.check(rows("good", "bad", None), accept)
    chosen = [source.choose(question, accept, random.Random(0)) for question in rows("good", "bad", None)]
    assert chosen == [Demonstration([1], 1.0), None, None]


@pytest.mark.parametrize(
    ("given", "texts", "message"),
    [
        (
            {"on_rejected": "raise"},
            ("good", "bad"),
            "Expected `solution` of f:1 to be a demonstration, but its reward is 0",
        ),
        ({}, ("bad", "bad"), "keep at least one demonstration, but had to drop .* 2 of 2 .*f:0"),
        ({"column": "other"}, ("good",), "no training question has `other`. The columns of f:0 .*: solution"),
        ({}, ("good", 7), "Expected a text in column `solution` of f:1, but got 7"),
    ],
)
def test_bad_demonstrations_are_named(given, texts, message):
    with pytest.raises(ValueError, match=message):
        ColumnDemonstrations(**given).check(rows(*texts), accept)


def test_the_runs_own_verifier_judges_demonstrations():
    module = build(HAPO, tiny_model(), half_right, tokenizer=TOKENIZER, **HAPO_LIMITS)
    for question in questions(8):
        text = question.columns["solution"]
        verdict = module.objective.verify(question, text)
        if half_right(question, text):
            assert verdict == Demonstration([*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id], 1.0)
        else:
            assert verdict == "its reward is 0"
    module.objective.verify.max_response_length = 5
    assert "tokens, `max_response_length` is 5" in module.objective.verify(questions(1)[0], text)


def test_the_buffer_keeps_the_newest_successes_of_each_question():
    buffer = SuccessBuffer(size=2)
    question = questions(1)[0]
    assert buffer.choose(question, accept, random.Random(0)) is None
    buffer.observe([(question.index, Demonstration([i], 1.0)) for i in range(4)] + [(7, Demonstration([9], 1.0))])
    assert buffer.choose(question, accept, random.Random(0)) == Demonstration([3], 1.0)
    other = SuccessBuffer(size=2, choice="random")
    other.load_state_dict(buffer.state_dict())
    assert {other.choose(question, accept, random.Random(i)).ids[0] for i in range(20)} == {2, 3}
