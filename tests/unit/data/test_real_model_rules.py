"""The rules that a real model is asked: disjoint splits, examples outside of them, and the verifier."""

import doctest

import pytest

from benchmarks import real_model
from benchmarks.real_model import RULES, CorrectSamples, Rule, exact, rows
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict


@pytest.mark.parametrize("rule", RULES)
def test_questions_of_a_rule_are_in_one_split_in_any_order_of_their_words(rule):
    split = {name: rows(rule, 2, name, 60) for name in ("train", "tuning", "held-out")}
    words = {name: {frozenset(asked.split()) for asked, _ in pairs} for name, (_, pairs) in split.items()}
    assert all(words.values())
    assert (
        not words["train"] & words["tuning"] | words["train"] & words["held-out"] | words["tuning"] & words["held-out"]
    )
    (examples,) = {tuple(examples) for examples, _ in split.values()}
    assert not {asked for asked, _ in examples} & {asked for _, pairs in split.values() for asked, _ in pairs}


def test_a_question_is_a_conversation_that_ends_with_it():
    data = Rule("last word", tuning=True)
    tuning, held_out = data.load("validation")[0], data.load("test")[0]
    assert [turn["role"] for turn in tuning.prompt] == ["system", *["user", "assistant"] * 2, "user"]
    assert tuning.prompt[-1]["content"].split()[-1] == tuning.answer == tuning.columns["solution"]
    assert tuning.prompt[:-1] == held_out.prompt[:-1]
    assert tuning.prompt[-1] != held_out.prompt[-1]
    assert [exact(tuning, text) for text in (f" {tuning.answer}\n", f"{tuning.answer}s")] == [1.0, 0.0]
    with pytest.raises(ValueError, match="`rule` to be among larger"):
        Rule("smaller")


def test_supervised_steps_learn_right_answers_alone():
    sample = lambda reward: Sample(Rollout(Question("?", "a"), [1], [2], None, "a", True), Verdict(reward))  # noqa: E731
    samples = [sample(reward) for reward in (1.0, 0.0, 1.0, 1.0)]
    CorrectSamples(0.5, num_generations=2).prepare(samples, None)
    assert [each.advantage for each in samples] == [1.0, 0.0, 1.0, 1.0]


def test_inflections():
    assert doctest.testmod(real_model).failed == 0
