"""Whatever a verifier does ends as a verdict or as an error that names the question."""

import asyncio
import math
import os
import signal
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards import BoxedAnswer, MultipleChoice
from pgpo_lightning.rewards.grade import check_question, grade


def ask(answer, **kwargs):
    return Question("What is it?", answer, index=3, source="train.json:4", **kwargs)


def raising(error):
    def verifier(question, response):
        raise error

    return verifier


class MuteError(Exception):
    def __str__(self):
        raise ValueError("no text")


class Lazy(Verdict):
    """A subclass whose reward is computed when it is asked for."""

    @property
    def reward(self):
        raise SystemExit(0)

    @reward.setter
    def reward(self, value):
        pass


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (1, Verdict(1.0)),
        (True, Verdict(1.0)),
        (np.float32(0.5), Verdict(0.5)),
        (np.bool_(True), Verdict(1.0)),
        (torch.tensor(0.5, dtype=torch.bfloat16), Verdict(0.5)),
        (Decimal("0.25"), Verdict(0.25)),
        (Fraction(3, 4), Verdict(0.75)),
        (1e16, Verdict(1e16)),
        (1e-46, Verdict(0.0)),  # 0 in float32
        (-1e-40, Verdict(0.0)),  # without all of its digits there, and 0 on some devices
        ((0.5, None), Verdict(0.5)),
        (-0.25, Verdict(-0.25)),
        ((0, "Too long."), Verdict(0.0, "Too long.")),
        (Verdict(1, "Fine.", "A"), Verdict(1.0, "Fine.", "A")),
    ],
)
def test_result(result, verdict):
    graded = grade(lambda question, response: result, ask("A"), "text")
    assert graded == verdict
    assert type(graded.reward) is float


def test_arguments_arrive():
    assert grade(lambda question, response: (len(response), question.answer), ask("A"), "text") == Verdict(4.0, "A")


@pytest.mark.parametrize(
    "result",
    [math.nan, math.inf, None, "1", (1.0,), (1.0, 2), (1.0, "a", "b"), Verdict(math.nan), Verdict("1"), Verdict(1.0, 2),
     Verdict(1.0, None, 3), [1.0, "a"]],
)  # fmt: skip
def test_bad_result(result):
    def judge(question, response):
        return result

    question = Question("p" * 90, "A", index=3, source="train.json:4")
    with pytest.raises(VerifierError) as caught:
        grade(judge, question, "text")
    message = str(caught.value)
    assert message.startswith("Expected verifier test_bad_result.<locals>.judge to return a finite number")
    assert message.endswith(f"but got {result!r} on question 3 of train.json:4 ('{'p' * 80}').")


def test_verifier_raises():
    with pytest.raises(
        VerifierError, match=r"MultipleChoice raised ValueError on question 3 of train.json:4 \('What"
    ) as caught:
        grade(MultipleChoice(), ask("E"), "A")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (1e39, r"got 1e\+39 .*: rewards have an absolute value of at most 1e\+16\."),
        (-(10**17), r"got -1000.*: rewards have an absolute value of at most 1e\+16\."),
        (10**400, r"got 1000"),
        (10**5000, r"got an integer of about 5001 digits"),
        (Fraction(10**400), r"got Fraction"),
        (1j, r"got 1j"),
        (Decimal("sNaN"), r"got Decimal"),
        (torch.tensor([1.0, 0.0]), r"got tensor\(\[1., 0.\]\)"),
        ({"score": 1.0}, r"got \{'score': 1.0\}"),
        ((1.0, "half \ud83d"), r"a lone surrogate"),
        (Verdict(1.0, None, "\udc00"), r"a lone surrogate"),
        ("x" * 5000, r"got 'x{499}\.\.\. \(5002 characters\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_reward(result, why):
    with pytest.raises(VerifierError, match=why) as caught:
        grade(lambda question, response: result, ask("A"), "text")
    assert "on question 3 of train.json:4 ('What is it?')" in str(caught.value)


def test_an_async_verifier_is_run_to_its_end():
    async def later(question, response):
        await asyncio.sleep(0)
        return 0.5, response

    async def failing(question, response):
        raise SystemExit(0)

    assert grade(later, ask("A"), "text") == Verdict(0.5, "text")
    assert grade(lambda question, response: later(question, response), ask("A"), "text") == Verdict(0.5, "text")
    with pytest.raises(VerifierError, match=r"failing raised SystemExit on question 3 of train.json:4"):
        grade(failing, ask("A"), "text")


def test_curves_of_a_verdict_are_numbers():
    assert grade(lambda question, response: Verdict(1, curves={"a": np.float32(2)}), ask("A"), "").curves == {"a": 2.0}
    with pytest.raises(VerifierError, match="its curves are numbers by name"):
        grade(lambda question, response: Verdict(1, curves={"a": "2"}), ask("A"), "")


def test_functions_that_do_not_return_are_named():
    def stream(question, response):
        yield 1.0

    with pytest.raises(VerifierError, match=r"verifier .*stream to return .* question 3 .*: it contains `yield`"):
        grade(stream, ask("A"), "text")


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), RecursionError("deep"), MuteError(), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_is_raised_is_the_verifiers_error(error):
    with pytest.raises(
        VerifierError, match=rf"raised {type(error).__name__} on question 3 of train.json:4 \('What"
    ) as caught:
        grade(raising(error), ask("A"), "text")
    assert caught.value.__cause__ is error


def test_a_verdict_may_be_of_a_subclass():
    with pytest.raises(VerifierError, match=r"raised SystemExit on question 3"):
        grade(lambda question, response: Lazy(1.0), ask("A"), "text")


def swallow(question, response):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # as `except:` does
        return 1.0
    return 0.5


def send(question, response):
    os.kill(os.getpid(), signal.SIGINT)
    return 1.0


@pytest.mark.parametrize("verifier", [send, swallow])
def test_ctrl_c_ends_the_run_also_in_a_verifier_that_catches_everything(verifier):
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        grade(verifier, ask("A"), "text")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_takes_note_of_a_signal_is_asked_and_may_put_another_in_its_place(monkeypatch):
    before, seen = signal.getsignal(signal.SIGINT), []

    def first(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once

    signal.signal(signal.SIGINT, first)
    try:
        assert grade(send, ask("A"), "text").reward == 1.0
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, first)
        grade(lambda question, response: signal.signal(signal.SIGINT, signal.SIG_IGN) and 1.0, ask("A"), "text")
        assert signal.getsignal(signal.SIGINT) is first, "a verifier may not take Ctrl-C away"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_verifier_changes_no_question():
    def vandal(question, response):
        question.answer, question.prompt = "B", "else"
        question.columns["tests"].append("else")
        question.columns.clear()
        return 1.0

    def vandal_of_messages(question, response):
        question.prompt[0]["content"] = "else"
        return 1.0

    question = ask("A", columns={"tests": ["a"], "nested": {"b": [1, (2,)]}})
    assert grade(vandal, question, "text").reward == 1.0
    assert question == ask("A", columns={"tests": ["a"], "nested": {"b": [1, (2,)]}})
    question.prompt = [{"role": "user", "content": "What?"}]
    grade(vandal_of_messages, question, "text")
    assert question.prompt[0]["content"] == "What?"


def test_a_question_arrives_as_it_is():
    question = ask(Decimal("1.5"), columns={"a": None, "b": [{"c": (1, 2)}], "d": np.arange(3), "e": b"x"})
    seen = []
    grade(lambda question, response: seen.append(question) or 1.0, question, "text")
    assert vars(seen[0]).keys() == vars(question).keys()
    assert repr(seen[0]) == repr(question)
    assert seen[0].columns["d"] is question.columns["d"]


def test_the_process_is_as_it_was(tmp_path):
    def state():
        return (os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
                torch.get_default_device(), sys.stdout, sys.stderr)  # fmt: skip

    def vandal(question, response):
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_device("meta")
        sys.stdout = sys.stderr = None
        if response == "fail":
            raise ValueError("broken")
        return 1.0

    before = state()
    assert grade(vandal, ask("A"), "text").reward == 1.0
    assert state() == before
    with pytest.raises(VerifierError, match="raised ValueError"):
        grade(vandal, ask("A"), "fail")
    assert state() == before


def test_shipped_verifiers_look_at_the_questions_beforehand():
    check_question(lambda question, response: 1.0, ask(None))
    check_question(BoxedAnswer(), ask("24"))
    with pytest.raises(ValueError, match=r"train\.json:4 to be in 'ABCD', but got 'E'"):
        check_question(MultipleChoice(), ask("E"))
    with pytest.raises(ValueError, match=r"train\.json:4 to have a gold answer"):
        check_question(BoxedAnswer(), ask([24]))
