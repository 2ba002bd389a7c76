"""What the self-teacher reads: exact texts, and who sees whose answer and feedback."""

import random
from collections import Counter

import pytest

from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.reprompt import (
    RepromptBuilder,
)
from tests.support.helpers import TOKENIZER
from tests.support.reprompts import DEFAULTS, END, FEEDBACK, SOLUTION, attach, row


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


@pytest.mark.parametrize("column", ["solution", "worked"])
def test_a_column_is_shown_to_every_response(column):
    asked = {"columns": {column: "<think> so </think>1+1=2"}}
    rows = [row("1+1=3", **asked), row("1+1=2", reward=1.0, **asked), row("2", reward=1.0, index=1), row("3", index=1)]
    named = {} if column == "solution" else {"demonstration_column": column}
    scalars = attach(rows, demonstration_source="column", **named)
    assert [r.reprompt for r in rows] == ["Place?" + SOLUTION + "1+1=2" + END] * 2 + [None] * 2
    assert scalars["self_distillation/success_sample_fraction"] == 0.5
    attach(rows, demonstration_source="column", remove_thinking_from_demonstration=False, **named)
    assert rows[0].reprompt == "Place?" + SOLUTION + "<think> so </think>1+1=2" + END


@pytest.mark.parametrize(
    "columns", [{}, {"solution": " "}, {"solution": None}, {"solution": 2}, {"solution": "<think> so"}]
)
def test_a_row_without_a_solution_has_its_feedback_alone(columns):
    rows = [row("1+1=3", feedback="wrong.", columns=columns), row("1+1=2", reward=1.0, columns=columns)]
    attach(rows, demonstration_source="column")
    assert [r.reprompt for r in rows] == ["Place?" + FEEDBACK + "wrong." + END, None]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"demonstration_column": "solution"}, "demonstration_source"),
        ({"demonstration_source": "column", "demonstration_choice": "independent"}, "demonstration_choice"),
        ({"demonstration_source": "own"}, "dont_reprompt_on_self_success"),
        ({"demonstration_source": "none", "demonstration_choice": "independent"}, "demonstration_choice"),
        ({"demonstration_source": "none", "include_environment_feedback": False}, "reprompt_without_context"),
        ({"reprompt_template": "{prompt}{feedback}"}, "reprompt_template"),
        ({"demonstration_source": "none", "reprompt_template": "{prompt}{solution}"}, "reprompt_template"),
    ],
)
def test_contradictory_contexts_are_refused(settings, field):
    with pytest.raises(ValueError, match=f"Expected .*`reprompt.{field}`"):
        RepromptBuilder(**DEFAULTS | settings)
