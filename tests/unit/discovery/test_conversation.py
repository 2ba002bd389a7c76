"""What the base model reads before its next attempt."""

import pytest

from pgpo_lightning.core.types import Question
from pgpo_lightning.discovery.conversation import feedback_turn, newest_that_fit, turns
from tests.support.attempts import attempt
from tests.support.helpers import tiny_sdpo

QUESTION = Question("2+2?", "4", system="Be brief.")


@pytest.fixture(scope="module")
def builder():
    return tiny_sdpo().objective.teaching.builder


def test_feedback_alone_in_the_words_of_the_self_teacher(builder):
    tries = [attempt(1, feedback="5 is wrong."), attempt(2, feedback=None), attempt(3, feedback="3 is wrong.")]
    system, user = feedback_turn(QUESTION, tries, builder)
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == (
        "2+2?\nThe following is feedback from your unsuccessful earlier attempt:\n\n5 is wrong.\n\n3 is wrong.\n\n"
        "Correctly solve the original question."
    )
    assert feedback_turn(QUESTION, [], builder) == QUESTION.messages()


def test_attempts_and_feedback_are_turns(builder):
    messages = turns(QUESTION, [attempt(1, feedback="5 is wrong.")], builder)
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "é1"
    assert messages[3]["content"].endswith("attempt:\n\n5 is wrong.")


def test_the_oldest_go_first_and_never_come_back():
    tried = []

    def render(attempts):
        tried.append([each.number for each in attempts])
        return [{"role": "user", "content": "x" * (3 * len(attempts) + 2)}]

    def encode(messages):
        return [0] * len(messages[0]["content"])

    tries = [attempt(i + 1) for i in range(5)]
    ids, left_out = newest_that_fit(tries, render, encode, limit=9)
    assert (len(ids), left_out, tried[-1]) == (8, 3, [4, 5])
    tried.clear()
    newest_that_fit([*tries, attempt(6)], render, encode, limit=9, start=left_out)
    assert tried == [[4, 5, 6], [5, 6]]
    with pytest.raises(ValueError, match="`conversation_tokens` to leave room for the question, but it is 1"):
        newest_that_fit(tries, render, encode, limit=1)
