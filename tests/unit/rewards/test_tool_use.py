"""Tool calls: every cell of the table in docs/code.md, and feedback that does not tell the answer."""

import json

import pytest

from pgpo_lightning.core.types import Question
from pgpo_lightning.rewards import ToolUse


def asked(*calls):
    answer = [{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls]
    return Question("Which tools?", json.dumps(answer), index=3, source="train.json:4")


def said(*calls):
    texts = [each if isinstance(each, str) else json.dumps(each) for _, each in calls]
    return "\n".join(
        f"Thought: so\nAction: {name}\nAction Input: {text}" for (name, _), text in zip(calls, texts, strict=True)
    )


GET = ("get", {"id": 1})
TWO = (GET, ("get", {"id": 2}))
NESTED = ("put", {"to": {"x": 1}, "list": [{"a": 1}]})
# gold, response, (reference, strict, strict in order)
TABLE = {
    "right": ((GET,), said(GET), (1, 1, 1)),
    "nested": ((NESTED,), said(NESTED), (0, 1, 1)),
    "ids 9 and 2": (TWO, said(("get", {"id": 9}), ("get", {"id": 2})), (1, 0, 0)),
    "a-b for a": ((("a", {}),), said(("a-b", {})), (1, 0, 0)),
    "no JSON for {}": ((("a", {}),), said(("a", "{'x'}")), (1, 0, 0)),
    "another order": ((GET, ("put", {"x": 2})), said(("put", {"x": 2}), GET), (1, 1, 0)),
    "a text for a number": ((GET,), said(("get", {"id": "1"})), (0, 0, 0)),
    "a brace in a text": ((("say", {"t": "a}b"}),), said(("say", {"t": "a}b"})), (0, 1, 1)),
    "one call too many": ((GET,), said(*TWO), (0, 0, 0)),
    "no call": ((GET,), "I do not know.", (0, 0, 0)),
    "true for 1": ((GET,), said(("get", {"id": True})), (1, 0, 0)),
    "text after the object": ((GET,), said(GET) + "\nObservation: {}", (1, 1, 1)),
    "fenced": ((GET,), 'Action: get\nAction Input: ```json\n{"id": 1}\n```', (0, 1, 1)),
}


@pytest.mark.parametrize("row", TABLE)
def test_cell(row):
    gold, response, rewards = TABLE[row]
    verifiers = ToolUse("reference"), ToolUse(), ToolUse(ordered=True)
    assert tuple(verifier(asked(*gold), response).reward for verifier in verifiers) == rewards


@pytest.mark.parametrize(
    ("gold", "response", "feedback"),
    [
        ((GET,), said(("get", {"id": 77})), "Call 1: the value of the argument `id` of `get` is wrong."),
        ((GET,), said(("get", {"id": 1, "x": 1})), "Call 1: the argument `x` of `get` is not needed."),
        ((GET,), said(("get", {})), "Call 1: an argument of `get` is missing."),
        ((GET,), said(("got", {"id": 1})), "Call 1: `got` is not the tool to call."),
        ((GET,), said(("get", "{oh")), "Call 1: the `Action Input` of `get` is no JSON object."),
        ((GET,), said(*TWO), "The number of calls is wrong: 2, which is too many."),
        (TWO, said(GET), "The number of calls is wrong: 1, which is too few."),
        (TWO, said(GET, ("get", {"id": 3})), "Call 2: the value of the argument `id` of `get` is wrong."),
    ],
)
def test_feedback_names_the_part_and_no_gold_value(gold, response, feedback):
    assert ToolUse()(asked(*gold), response).feedback == feedback
    assert ToolUse(feedback="none")(asked(*gold), response).feedback is None


@pytest.mark.parametrize("variant", ["strict", "reference"])
def test_gold_is_in_the_feedback_only_if_asked_for(variant):
    question, response = asked(("get", {"id": 4711})), said(("get", {"id": 1}))
    assert "4711" not in ToolUse(variant)(question, response).feedback
    expected = "Action inputs mismatch: predicted {'id': 1}, expected {'id': 4711}"
    assert ToolUse(variant, feedback="gold")(question, response).feedback == expected


def test_settings_and_rows_that_contradict():
    with pytest.raises(ValueError, match="Expected `ordered` false with `variant` reference"):
        ToolUse("reference", ordered=True)
    for answer in ("A", "[]", [{"Action": "a", "Action_Input": "no"}], [{"x": 1}], None):
        with pytest.raises(
            ValueError, match=r"Expected the answer of question 3 of train.json:4 to be a list of objects"
        ):
            ToolUse().check_question(Question("x", answer, index=3, source="train.json:4"))


def test_answers_of_equal_calls_are_equal_votes():
    one, other = said(GET, ("put", {"x": 1, "y": 2})), said(("put", {"y": 2, "x": 1}), GET)
    question = asked(GET)
    assert ToolUse()(question, one).answer == ToolUse()(question, other).answer != ToolUse()(question, said(GET)).answer


def test_odd_responses_end_quickly():
    for response in (
        "Action:" * 20000,
        "Action: a\nAction Input: " + "{" * 100000,
        "Action: a\nAction Input: " + '{"a":' * 5000,
        "\ud800",
    ):
        for variant in ("strict", "reference"):
            assert ToolUse(variant)(asked(GET), response).reward == 0
