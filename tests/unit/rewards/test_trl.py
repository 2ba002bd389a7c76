"""Reward functions in TRL's calling convention: what they get, what becomes of what they return, and which errors name what."""

import asyncio
import math
from functools import partial

import pytest
import torch

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.rewards import TRLReward, grade
from pgpo_lightning.rewards.batches import graded

CHAT = [{"role": "user", "content": "Light?"}]


def rollout(text, question, ids=(3, 4)):
    return Rollout(question, [1], list(ids), torch.zeros(len(ids)), text, True)


def ask(prompt="Light?", index=0, **columns):
    return Question(
        prompt, columns.pop("answer", None), index=index, source=f"train.jsonl:{index + 1}", columns=columns
    )


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def keyword(completions, keyword, **kwargs):
    return [float(word in text) for text, word in zip(completions, keyword, strict=True)]


async def judge(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [None if "?" in text else 0.5 for text in completions]


def verdicts(funcs, rows, weights=None, step=0):
    results = list(graded(TRLReward(funcs, weights), rows, step=step))
    for result in results:
        if isinstance(result, VerifierError):
            raise result
    return results


def test_functions_get_what_trl_gives_them():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * len(kwargs["prompts"])

    question = ask(level=3, keyword="sun", completion_ids="a column of this name")
    question.privileged_context = "It is the sun."
    verdicts(spy, [rollout("a", question, [7, 2]), rollout("b", question)], step=4)
    assert seen.pop("trainer_state").global_step == 4
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["Light?", "Light?"],
        "completions": ["a", "b"],
        "completion_ids": [[7, 2], [3, 4]],
        "level": [3, 3],
        "keyword": ["sun", "sun"],
        "privileged_context": ["It is the sun."] * 2,
    }


def test_chat_prompts_have_chat_completions():
    seen = {}

    def spy(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return torch.tensor([1.0])

    assert verdicts(spy, [rollout("a", ask(CHAT))]) == [Verdict(1.0, curves={"spy/mean": 1.0})]
    assert seen == {"prompts": [CHAT], "completions": [[{"role": "assistant", "content": "a"}]]}


def test_the_sum_is_weighted_and_every_function_has_a_curve():
    rows = [rollout("the sun", ask(keyword="sun")), rollout("moon?", ask(keyword="sun"))]
    first, second = verdicts([keyword, length, judge], rows, [2.0, 0.1, 1.0])
    assert first.reward == pytest.approx(2 * 1 + 0.1 * 7 + 0.5)
    assert first.curves == {"keyword/mean": 1.0, "length/mean": 7.0, "judge/mean": 0.5}
    assert second.reward == pytest.approx(0.1 * 5)  # None is left out of the sum
    assert second.curves == {"keyword/mean": 0.0, "length/mean": 5.0}
    assert [v.reward for v in verdicts([keyword, length], rows)] == [8.0, 5.0]


def test_a_response_without_any_reward_is_an_error_that_names_it_and_no_other():
    rows = [rollout("sun", ask()), rollout("moon?", ask(index=1))]
    first, second = graded(TRLReward(judge), rows)
    assert first == Verdict(0.5, curves={"judge/mean": 0.5})
    assert "on question 1 of train.jsonl:2 ('Light?'): all reward functions returned None" in str(second)


def test_feedback_beyond_trl():
    def helpful(completions, **kwargs):
        return [(0.0, "Say sun."), (1.0, None)]

    def strict(completions, **kwargs):
        return [(0.0, "Be short."), None]

    question = ask()
    found = verdicts([helpful, strict], [rollout("a", question), rollout("b", question)])
    assert [(v.reward, v.feedback) for v in found] == [(0.0, "Say sun.\n\nBe short."), (1.0, None)]


def test_metrics_become_curves():
    def measured(completions, log_metric, log_extra, **kwargs):
        log_metric("agreement", 0.25)
        log_extra("gold", ["a"] * len(completions))
        return [1.0] * len(completions)

    found = verdicts(measured, [rollout("a", ask()), rollout("b", ask())])
    assert [v.curves for v in found] == [{"measured/mean": 1.0, "agreement": 0.25}] * 2


def test_import_paths():
    assert TRLReward(["math.hypot", length]).funcs == [math.hypot, length]
    assert TRLReward("math.hypot").names == ["hypot"]


def test_names_are_those_of_trl():
    class Judge:
        def __call__(self, completions, **kwargs):
            return [1.0]

    named = Judge()
    named.__name__ = "overlong"
    assert TRLReward([length, partial(length), Judge(), named]).names == ["length", "length_2", "Judge", "overlong"]


def test_errors_name_the_function_and_the_question():
    def broken(completions, **kwargs):
        raise KeyError("gold")

    async def broken_later(completions, **kwargs):
        raise KeyError("gold")

    def short(completions, **kwargs):
        return [1.0]

    def scalar(completions, **kwargs):
        return 1.0

    def infinite(completions, **kwargs):
        return [1.0, math.inf]

    def wordy(completions, **kwargs):
        return [1.0, "much"]

    rows = [rollout("a", ask()), rollout("b", ask(index=1))]
    for func, said in [
        (
            broken,
            r"TRLReward raised RuntimeError on 2 responses to 2 questions, the first question 0 .*function broken raised",
        ),
        (broken_later, r"on 2 responses .* the reward function broken_later raised KeyError: 'gold'"),
        (short, r"Expected the reward function short to return 2 rewards, one per completion, but got 1"),
        (scalar, r"the reward function scalar raised TypeError"),
        (infinite, r"finite number, .* on question 1 of train.jsonl:2"),
        (wordy, r"raised ValueError on question 1 of train.jsonl:2"),
    ]:
        with pytest.raises(VerifierError, match=said):
            verdicts([length, func], rows)


def test_a_missing_column_is_named_before_anything_is_sampled():
    verifier = TRLReward([length, keyword])
    verifier.check_question(ask(keyword="sun"))
    with pytest.raises(
        ValueError, match=r"train.jsonl:1 to have the column `keyword`, which the reward function keyword needs"
    ):
        verifier.check_question(ask(level=3))


def test_a_text_without_token_ids():
    def by_ids(completion_ids, **kwargs):
        return [1.0]

    assert grade(TRLReward(length), ask(), "four") == Verdict(4.0, curves={"length/mean": 4.0})
    with pytest.raises(VerifierError, match="token ids for the reward function by_ids"):
        grade(TRLReward(by_ids), ask(), "four")
    with pytest.raises(VerifierError, match="all reward functions returned None"):
        grade(TRLReward(judge), ask(), "moon?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "Expected at least one function in `funcs`"),
        (([length], [1.0, 2.0]), "Expected one of `weights` for each of 1 functions in `funcs`, but got 2"),
        ((torch.nn.Linear(1, 1),), "Expected functions in `funcs`, but got the model Linear"),
        (("length",), "Expected the import path of a function in `funcs`, .*but got length"),
        (("math.nothing",), "import path of a function in `funcs`, .*but got math.nothing: module 'math' has no"),
        ((["Qwen/Qwen3-0.6B"],), "import path of a function in `funcs`, .*but got Qwen"),
        (("math.pi",), "Expected a function at math.pi in `funcs`, but it is of the class float"),
        ((3,), "Expected `funcs` to be functions or their import paths, but got 3"),
        ((length, [math.nan]), r"Expected `weights\[0\]` to be finite"),
    ],
)
def test_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        TRLReward(*arguments)
