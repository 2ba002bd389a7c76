"""What the self-teacher is told: exact texts, who sees whose answer, and what happens when it gets too long."""

import random
from collections import Counter

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
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
from tests.support.helpers import TOKENIZER, loader, questions, tiny_sdpo, trainer

DEFAULTS = {
    "success_reward_threshold": 0.5,
    "demonstration_choice": "shared",
    "dont_reprompt_on_self_success": True,
    "remove_thinking_from_demonstration": True,
    "include_environment_feedback": True,
    "environment_feedback_only_without_solution": False,
    "max_reprompt_len": 500,
    "reprompt_template": REPROMPT_TEMPLATE,
    "solution_template": SOLUTION_TEMPLATE,
    "feedback_template": FEEDBACK_TEMPLATE,
}
END = "\n\nCorrectly solve the original question."
SOLUTION = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"


def row(text, reward=0.0, feedback=None, index=0, prompt="Place?", **question):
    asked = Question(prompt, "1", index=index, **question)
    return Sample(Rollout(asked, [4], [6], torch.zeros(1), text, True), Verdict(reward, feedback))


def attach(rows, seed=0, tokenizer=TOKENIZER, **settings):
    encoder = PromptEncoder(tokenizer, False)
    builder = RepromptBuilder(**DEFAULTS | settings)
    return builder.attach(rows, encoder.messages, encoder.tokens, encoder.text, random.Random(seed), encoder.answer)


# ------------------------------------------------------------------------------------------------------- exact texts


@pytest.mark.parametrize(
    ("solved", "feedback", "text"),
    [
        (True, None, "Place?" + SOLUTION + "1+1=2" + END),
        (False, "wrong.", "Place?" + FEEDBACK + "wrong." + END),
        (True, "wrong.", "Place?" + SOLUTION + "1+1=2" + FEEDBACK + "wrong." + END),
        (False, None, None),
        (False, " \n", None),
    ],
)
def test_text_and_tokens_of_a_reprompt(solved, feedback, text):
    rows = [row("1+1=3", feedback=feedback), row("1+1=2", reward=float(solved))]
    attach(rows)
    assert rows[0].reprompt == text
    if text is None:
        assert rows[0].reprompt_ids is None
    else:
        assert TOKENIZER.decode(rows[0].reprompt_ids) == f"<user>{text}<eos><assistant>"


def test_system_message_and_earlier_turns_are_kept():
    turns = [
        {"role": "user", "content": "Mass?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Place?"},
    ]
    rows = [row("1", system="A b c", prompt=turns), row("2", reward=1.0, system="A b c", prompt=turns)]
    attach(rows)
    text = "Place?" + SOLUTION + "2" + END
    assert TOKENIZER.decode(rows[0].reprompt_ids) == (
        f"<system>A b c<eos><user>Mass?<eos><assistant>7<eos><user>{text}<eos><assistant>"
    )
    assert rows[0].reprompt == text
    assert turns[2]["content"] == "Place?"  # the question's own messages are not rewritten


# ----------------------------------------------------------------------------------------- whose answer, whose feedback


@pytest.mark.parametrize(("successes", "in_loss"), [(0, 0), (1, 7), (2, 8), (5, 8), (8, 8)])
def test_rows_with_a_teacher(successes, in_loss):
    rows = [row(f"{i}", reward=float(i < successes)) for i in range(8)]
    random.Random(successes).shuffle(rows)
    attach(rows)
    assert sum(r.reprompt_ids is not None for r in rows) == in_loss
    if successes == 1:
        assert [r.rollout.text for r in rows if r.reprompt_ids is None] == ["0"]


@pytest.mark.parametrize("others_only", [True, False])
def test_own_answer_is_a_demonstration_only_if_asked_for(others_only):
    own = 0
    for seed in range(50):
        rows = [row(f"{i}", reward=float(i < 3)) for i in range(4)]
        attach(rows, seed, dont_reprompt_on_self_success=others_only)
        own += sum(SOLUTION + r.rollout.text + END in r.reprompt for r in rows)
    assert own == 0 if others_only else 30 < own < 70  # a third of 150

    lone = row("1", reward=1.0)
    attach([lone], dont_reprompt_on_self_success=others_only)
    assert lone.reprompt == (None if others_only else "Place?" + SOLUTION + "1" + END)


def test_equal_texts_are_still_different_attempts():
    rows = [row("2", reward=1.0), row("2", reward=1.0)]
    attach(rows)
    assert [r.reprompt for r in rows] == ["Place?" + SOLUTION + "2" + END] * 2


def test_demonstrations_come_from_the_same_question():
    for seed in range(20):
        rows = [row(f"{q}", reward=float(i < 2), index=q) for i in range(4) for q in range(3)]
        attach(rows, seed)
        assert all(r.reprompt == "Place?" + SOLUTION + r.rollout.text + END for r in rows)


def test_threshold_is_inclusive():
    rows = [row("1"), row("2", reward=0.5), row("3", reward=0.49)]
    attach(rows)
    assert [r.reprompt for r in rows] == ["Place?" + SOLUTION + "2" + END, None, "Place?" + SOLUTION + "2" + END]


@pytest.mark.parametrize("choice", ["shared", "independent"])
@pytest.mark.parametrize("asking", [0, 3])  # a failure, which may see all five successes; a success, which may see four
def test_every_demonstration_is_equally_likely(asking, choice):
    counts, draws = Counter(), 2000
    builder = RepromptBuilder(**DEFAULTS | {"demonstration_choice": choice})
    for seed in range(draws):
        # Of different lengths: the reference's choice depends on them.
        rows = [row("0"), *(row("1" * i, reward=1.0) for i in range(1, 6))]
        builder.attach(rows, lambda _: [0], list, str, random.Random(seed))
        counts[rows[asking].reprompt.removeprefix("Place?" + SOLUTION).removesuffix(END)] += 1
    possible = {"1" * i for i in range(1, 6) if i != asking}
    assert set(counts) == possible
    expected = draws / len(possible)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20  # p < 0.001


def test_a_group_shares_its_demonstration_or_draws_for_every_row():
    contexts = {"shared": set(), "independent": set()}
    for choice, seen in contexts.items():
        for seed in range(20):
            rows = [row(f"{i}", reward=float(i < 4), index=q) for q in range(2) for i in range(8)]
            attach(rows, seed, demonstration_choice=choice)
            for group in (rows[:8], rows[8:]):
                shown = Counter(r.reprompt for r in group)
                seen.add(len(shown))
                if choice == "shared":
                    (most, count), (_, other) = shown.most_common()
                    assert (count, other) == (7, 1)
                    assert [r.rollout.text in most for r in group].count(True) == 1  # its own row sees the second
    assert contexts["shared"] == {2}
    assert max(contexts["independent"]) == 4


def test_demonstrations_are_a_function_of_the_generator():
    def texts(seed):
        rows = [row(f"{i}", reward=float(i % 2)) for i in range(8)]
        random.seed(len(set(seen)))  # the global generator plays no part
        attach(rows, seed, demonstration_choice="independent")
        return tuple(r.reprompt for r in rows)

    seen = []
    for seed in range(5):
        seen.append(texts(seed))
        assert seen[-1] == texts(seed)
    assert len(set(seen)) == 5


def test_feedback_reaches_only_its_own_attempt():
    rows = [
        row("1", feedback="1 is wrong"),
        row("2"),
        row("3", feedback="3 is wrong"),
        row("1", feedback="1 was wrong"),
    ]
    attach(rows)
    assert [r.reprompt and r.reprompt.removeprefix("Place?" + FEEDBACK).removesuffix(END) for r in rows] == [
        "1 is wrong",
        None,
        "3 is wrong",
        "1 was wrong",
    ]


@pytest.mark.parametrize(("feedback", "told"), [(None, "No 4"), ("", "No 4"), ("wrong.", "wrong.")])
def test_privileged_context_stands_in_for_missing_feedback(feedback, told):
    wrong = row("1", feedback=feedback, privileged_context="No 4")
    attach([wrong])
    assert wrong.reprompt == "Place?" + FEEDBACK + told + END


@pytest.mark.parametrize("only_without_solution", [True, False])
def test_feedback_beside_a_demonstration(only_without_solution):
    rows = [row("1", feedback="wrong."), row("2", reward=1.0, feedback="found.")]
    scalars = attach(rows, environment_feedback_only_without_solution=only_without_solution)
    beside = "" if only_without_solution else FEEDBACK + "wrong."
    assert rows[0].reprompt == "Place?" + SOLUTION + "2" + beside + END
    assert rows[1].reprompt == "Place?" + FEEDBACK + "found." + END  # it has no demonstration, so its feedback counts
    assert scalars["self_distillation/feedback_available_fraction"] == 1.0
    assert scalars["self_distillation/feedback_used_fraction"] == (0.5 if only_without_solution else 1.0)


def test_feedback_switched_off():
    rows = [row("1", feedback="wrong."), row("3", privileged_context="No 4"), row("2", reward=1.0)]
    scalars = attach(rows, include_environment_feedback=False)
    assert [r.reprompt for r in rows] == ["Place?" + SOLUTION + "2" + END] * 2 + [None]
    assert scalars["self_distillation/feedback_available_fraction"] == 0.0
    alone = row("1", feedback="wrong.", privileged_context="No 4")
    attach([alone], include_environment_feedback=False)
    assert alone.reprompt is alone.reprompt_ids is None


# ------------------------------------------------------------------------------------------------------------ thinking


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


# -------------------------------------------------------------------------------------------------------------- length

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


# ----------------------------------------------------------------------------------------------------------- fractions


def test_fractions():
    rows = [
        *(
            row(f"{i}", reward=float(i == 0), index=0, feedback="wrong." if i < 2 else None) for i in range(4)
        ),  # one success
        *(row(f"{i}", reward=0.0, index=1, feedback="wrong." if i == 3 else " ") for i in range(4)),  # none
        *(row(f"{i}", reward=float(i < 2), index=2) for i in range(4)),  # two
    ]
    assert attach(rows, environment_feedback_only_without_solution=True) == pytest.approx(
        {
            "self_distillation/success_group_fraction": 2 / 3,
            "self_distillation/success_sample_fraction": 7 / 12,  # 3 of the first group, all of the last
            "self_distillation/feedback_available_fraction": 3 / 12,
            "self_distillation/feedback_used_fraction": 2 / 12,  # the second failure of group 0 has a demonstration
            "self_distillation/reprompt_sample_fraction": 9 / 12,
            "self_distillation/reprompt_trimmed_fraction": 0.0,
            "self_distillation/reprompt_dropped_fraction": 0.0,
        }
    )
    assert set(attach([]).values()) == {0.0}


# ----------------------------------------------------------------------------------------------------------- templates


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


# ------------------------------------------------------------------------------------------------- which context


def test_own_demonstration_reaches_its_own_success_only():
    rows = [row("first", 1.0), row("second", 1.0), row("failed", feedback="wrong.")]
    attach(rows, demonstration_source="own", dont_reprompt_on_self_success=False, include_environment_feedback=False)
    assert [r.reprompt for r in rows] == [
        "Place?" + SOLUTION + "first" + END,
        "Place?" + SOLUTION + "second" + END,
        None,
    ]


def test_own_demonstration_or_else_feedback():
    rows = [row("first", 1.0), row("failed", feedback="wrong.")]
    attach(rows, demonstration_source="own", dont_reprompt_on_self_success=False)
    assert [r.reprompt for r in rows] == ["Place?" + SOLUTION + "first" + END, "Place?" + FEEDBACK + "wrong." + END]


def test_feedback_without_demonstrations():
    rows = [row("right", 1.0), row("failed", feedback="wrong.")]
    scalars = attach(rows, demonstration_source="none")
    assert [r.reprompt for r in rows] == [None, "Place?" + FEEDBACK + "wrong." + END]
    assert scalars["self_distillation/success_sample_fraction"] == 0


def test_without_any_context_the_teacher_reads_what_the_student_reads():
    rows = [row("right", 1.0, system="Be brief."), row("failed", feedback="wrong.", system="Be brief.")]
    none = {"demonstration_source": "none", "include_environment_feedback": False, "reprompt_without_context": True}
    attach(rows, reprompt_template="{prompt}{solution}{feedback}", **none)
    assert [r.reprompt_ids for r in rows] == [
        PromptEncoder(TOKENIZER, False).question(r.rollout.question) for r in rows
    ]


def test_the_template_alone_can_be_the_context():
    rows = [row("right", 1.0), row("failed", feedback="wrong.")]
    settings = {"demonstration_source": "none", "include_environment_feedback": False, "reprompt_without_context": True}
    scalars = attach(rows, reprompt_template="{prompt} Be careful.", **settings)
    assert [r.reprompt for r in rows] == ["Place? Be careful."] * 2
    assert scalars["self_distillation/reprompt_sample_fraction"] == 1
    long = [row("right", 1.0, prompt="word " * 40)]
    assert attach(long, max_reprompt_len=20, **settings)["self_distillation/reprompt_dropped_fraction"] == 1


def test_rows_left_without_context_join_only_if_asked_for():
    rows = [row("first", 1.0), row("failed")]
    attach(rows, reprompt_without_context=True)
    assert [r.reprompt for r in rows] == ["Place?" + END, "Place?" + SOLUTION + "first" + END]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"demonstration_source": "own"}, "dont_reprompt_on_self_success"),
        ({"demonstration_source": "none", "demonstration_choice": "independent"}, "demonstration_choice"),
        ({"demonstration_source": "none", "include_environment_feedback": False}, "reprompt_without_context"),
        ({"reprompt_template": "{prompt}{feedback}"}, "reprompt_template"),
        ({"demonstration_source": "none", "reprompt_template": "{prompt}{solution}"}, "reprompt_template"),
    ],
)
def test_contradictory_contexts_are_refused(settings, field):
    with pytest.raises(ValueError, match=f"Expected .*`{field}`"):
        RepromptBuilder(**DEFAULTS | settings)


@pytest.mark.parametrize("field", ["reprompt_template", "solution_template", "feedback_template"])
def test_a_template_with_half_a_character_is_refused(field):
    with pytest.raises(ValueError, match=rf"`{field}` to have whole characters, but got the lone surrogate '\\ud83d'"):
        RepromptBuilder(**DEFAULTS | {field: DEFAULTS[field] + "\ud83d"})


def test_a_template_without_room_for_a_question_is_refused_before_anything_is_sampled(tmp_path):
    module = tiny_sdpo(reprompt_template="{prompt}{solution}{feedback}" + " a" * 200)
    with pytest.raises(MisconfigurationException, match=r"takes 203 of `max_reprompt_len`=160 tokens by itself"):
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(2)))
