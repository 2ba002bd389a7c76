"""Thinking, length and templates of the reprompt: what is removed, cut and refused."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.rollout.thinking import remove_thinking
from pgpo_lightning.teachers.reprompt import (
    FEEDBACK_TEMPLATE,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    RepromptBuilder,
    check_template,
    fill,
)
from tests.support.helpers import TOKENIZER
from tests.support.reprompts import DEFAULTS, END, FEEDBACK, SOLUTION, attach, row


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a b</think>\n\n  1+1=2", "1+1=2"),
        ("<think>a\nb\n\nc</think>2", "2"),
        ("<think>a</think> x <think>b</think>\ty", "x y"),
        ("<think></think>2", "2"),
        ("<think>a</think> 2 <think>b", "2 "),
        ("a</think> 2", "2"),
        ("a\n<think>b</think> c</think>\n\n2", "2"),
        ("2 ", "2 "),
    ],
)
def test_thinking_is_removed_from_demonstrations(text, left):
    assert remove_thinking(text) == left
    rows = [row("0"), row(text, reward=1.0)]
    attach(rows)
    assert rows[0].reprompt == "Place?" + SOLUTION + left + END
    attach(rows, remove_thinking_from_demonstration=False)
    assert rows[0].reprompt == "Place?" + SOLUTION + text + END


@pytest.mark.parametrize("text", ["<think>a</think>\n", "<think>a b 2", "a b</think>", " \n"])
def test_a_demonstration_that_was_all_thinking_is_none(text):
    rows = [row("0"), row(text, reward=1.0)]
    scalars = attach(rows)
    assert rows[0].reprompt is None
    assert scalars["self_distillation/success_sample_fraction"] == 0.0


HEAD = PromptEncoder(TOKENIZER, False).messages([{"role": "user", "content": "Place?" + SOLUTION + " a"}])[:-3]
TAIL = TOKENIZER(END + "<eos><assistant>")["input_ids"]


def long(n):
    """Text of n tokens, two characters each."""
    return " a" + "".join(random.Random(0).choices([" b", " c", " d", " e"], k=n - 1))


@pytest.mark.parametrize("limit", [60, 59, 45, 30])
def test_the_end_of_the_demonstration_is_cut(limit):
    demonstration = long(100)
    rows = [row("1"), row(demonstration, reward=1.0)]
    scalars = attach(rows, max_reprompt_len=limit)
    ids = rows[0].reprompt_ids
    assert limit - 1 <= len(ids) <= limit  # nothing wasted but the one token of safety
    assert ids[: len(HEAD)] == HEAD
    assert ids[-len(TAIL) :] == TAIL
    middle = TOKENIZER.decode(ids[len(HEAD) : -len(TAIL)])
    assert demonstration.startswith(middle)
    assert rows[0].reprompt == "Place?" + SOLUTION + middle + END
    assert scalars["self_distillation/reprompt_trimmed_fraction"] == 0.5
    assert scalars["self_distillation/reprompt_dropped_fraction"] == 0.0


def test_a_reprompt_of_exactly_the_limit_stays_whole():
    rows = [row("1"), row(long(20), reward=1.0)]
    limit = len(HEAD) + 20 + len(TAIL)
    scalars = attach(rows, max_reprompt_len=limit)
    assert rows[0].reprompt == "Place?" + SOLUTION + long(20) + END
    assert scalars["self_distillation/reprompt_trimmed_fraction"] == 0.0
    attach(rows, max_reprompt_len=limit - 1)
    assert rows[0].reprompt == "Place?" + SOLUTION + long(20)[: 2 * 18] + END


def test_the_demonstration_goes_before_the_feedback():
    def told(limit):
        rows = [row("1", feedback=" x y z"), row(long(20), reward=1.0)]
        attach(rows, max_reprompt_len=limit)
        return rows[0].reprompt, rows[0].reprompt_ids

    tail = TOKENIZER(FEEDBACK + " x y z" + END + "<eos><assistant>")["input_ids"]
    text, ids = told(len(HEAD) + 10 + len(tail))
    assert text == "Place?" + SOLUTION + long(20)[: 2 * 9] + FEEDBACK + " x y z" + END
    assert ids[: len(HEAD)] == HEAD
    assert ids[-len(tail) :] == tail
    # Too little room for both headers: the feedback alone, whole if it fits, and cut from its end if not.
    whole = len(TOKENIZER("<user>Place?")["input_ids"]) + len(tail)
    assert told(whole)[0] == "Place?" + FEEDBACK + " x y z" + END
    assert told(whole - 1)[0] == "Place?" + FEEDBACK + " x" + END
    assert told(whole - 3) == (None, None)


def test_a_question_that_leaves_no_room_has_no_teacher():
    rows = [row("1", prompt=long(50)), row("2", reward=1.0, prompt=long(50)), row("1", index=1), row("2", 1.0, index=1)]
    scalars = attach(rows, max_reprompt_len=50)
    assert [r.reprompt_ids is None for r in rows] == [True, True, False, True]
    assert rows[0].reprompt is None
    assert scalars["self_distillation/reprompt_dropped_fraction"] == 0.25
    assert scalars["self_distillation/reprompt_trimmed_fraction"] == 0.25
    assert scalars["self_distillation/reprompt_sample_fraction"] == 0.25
    assert scalars["self_distillation/success_sample_fraction"] == 0.5


def test_cutting_ends_even_if_cut_text_encodes_to_more_tokens():
    # Bytes as tokens: a cut inside a character decodes to U+FFFD, which is three bytes again.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="Ġ"), False)
    calls = []

    def encode(messages):
        calls.append(messages)
        assert len(calls) < 100, "it cuts the same text again and again"
        return encoder.messages(messages)

    rows = [row("1"), row("🙂" * 10, reward=1.0)]
    whole = len(encoder.tokens("Place?" + SOLUTION + "🙂" * 10 + END))
    for limit in range(whole - 40, whole):
        calls.clear()
        rows[0].reprompt_ids = None
        builder = RepromptBuilder(**DEFAULTS | {"max_reprompt_len": limit})
        builder.attach(rows, encode, encoder.tokens, encoder.text, random.Random(0))
        assert rows[0].reprompt_ids is None or len(rows[0].reprompt_ids) <= limit


def test_braces_in_templates_and_values_are_left_alone():
    rows = [
        row("1", prompt="{solution} {feedback}", feedback=r"{prompt} {successful_previous_attempt} {0} {"),
        row(r"{prompt} {feedback_raw} \boxed{2}", reward=1.0, prompt="{solution} {feedback}"),
    ]
    attach(
        rows,
        reprompt_template=r"{prompt}{solution}{feedback} Use \boxed{}, {x} or {{ }}. \1 \g<0>",
        solution_template=r" [\boxed{answer}: {successful_previous_attempt}]",
        feedback_template=" [{feedback_raw} {}]",
    )
    assert rows[0].reprompt == (
        r"{solution} {feedback} [\boxed{answer}: {prompt} {feedback_raw} \boxed{2}]"
        r" [{prompt} {successful_previous_attempt} {0} { {}] Use \boxed{}, {x} or {{ }}. \1 \g<0>"
    )


def test_fill():
    assert fill(r"{a}{b}{a} \boxed{}{c}", a="{b}", b=r"\1{a}") == r"{b}\1{a}{b} \boxed{}{c}"


def test_check_template():
    check_template("solution_template", SOLUTION_TEMPLATE, ("successful_previous_attempt",))
    check_template("feedback_template", FEEDBACK_TEMPLATE, ("feedback_raw",))
    check_template("reprompt_template", REPROMPT_TEMPLATE, ("prompt", "solution", "feedback"))
    for template in ("{prompt} solution {feedback}", "{prompt}{ solution }{feedback}", "{prompt}{solutions}{feedback}"):
        with pytest.raises(ValueError, match=r"`reprompt_template` to contain the placeholder \{solution\}, but got '"):
            check_template("reprompt_template", template, ("prompt", "solution", "feedback"))


@pytest.mark.parametrize("field", ["reprompt_template", "solution_template", "feedback_template"])
def test_a_template_with_half_a_character_is_refused(field):
    with pytest.raises(
        ValueError, match=rf"`reprompt.{field}` to have whole characters, but got the lone surrogate '\\ud83d'"
    ):
        RepromptBuilder(**DEFAULTS | {field: DEFAULTS[field] + "\ud83d"})
