"""Grading beside sampling: verdicts and errors are those of grading afterwards, in the same order; nothing is left running."""

import asyncio
import os
import threading
import time

import pytest

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.types import Verdict
from pgpo_lightning.rewards import BoxedAnswer, CodeExecution, TRLReward
from pgpo_lightning.rewards.batches import graded
from pgpo_lightning.rewards.early_grading import early_grading, grades_early
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.unit.rewards.test_batches import AsyncBatched, Batched, coroutine, plain, rollouts, slow

WAYS = [(slow, 3), (coroutine, None), (coroutine, 2), (Batched(), None), (AsyncBatched(), None)]


def shown(results):
    return [str(each) if isinstance(each, VerifierError) else each for each in results]


@pytest.mark.parametrize(("verifier", "workers"), WAYS, ids=["threads", "async", "async 2", "batch", "async batch"])
def test_verdicts_and_errors_are_those_of_grading_afterwards(verifier, workers):
    asked = rollouts()
    with early_grading(verifier, workers) as grading:
        for rollout in asked[6:0:-2]:  # as they are finished; the others are not handed over
            grading.put(rollout)
            time.sleep(0.01)
        found = list(grading.results(asked[:4])) + list(grading.results(asked[4:]))
    assert shown(found) == shown(graded(verifier, rollouts(), workers))
    assert grading.seconds > 0
    assert not [each for each in threading.enumerate() if "verifier" in each.name]


def test_a_batch_has_what_was_finished_during_the_last_call():
    calls, go = [], threading.Event()

    class Waiting(Batched):
        def grade_batch(self, rollouts, step):
            calls.append(([rollout.text for rollout in rollouts], step))
            go.wait(10)
            return [1.0] * len(rollouts)

    asked = rollouts(6)
    with early_grading(Waiting(), None) as grading:
        grading.step = 3
        grading.put(asked[2])
        while not calls:
            time.sleep(0.001)
        for rollout in (asked[2], asked[5], asked[0]):
            grading.put(rollout)
        go.set()
        assert list(grading.results(asked)) == [Verdict(1.0)] * 6
    graded_texts = [text for texts, _ in calls for text in texts]
    assert sorted(graded_texts) == [rollout.text for rollout in asked]  # each once
    assert calls[0] == (["text 2"], 3)
    assert calls[1][0][:2] == ["text 5", "text 0"]


def test_a_call_that_fails_is_the_failure_of_its_responses_and_one_that_returns_too_few_is_raised():
    class Broken(Batched):
        def __init__(self, failure):
            self.failure = failure

        def grade_batch(self, rollouts, step):
            if any(rollout.text == "text 1" for rollout in rollouts):
                return self.failure()
            return [1.0] * len(rollouts)

    asked = rollouts(4)
    with early_grading(Broken(lambda: 1 / 0), None) as grading:
        grading.put(asked[1])
        time.sleep(0.05)
        first, second, *rest = grading.results(asked)
    assert [first, *rest] == [Verdict(1.0)] * 3
    assert "Broken raised ZeroDivisionError on 1 responses to 1 questions" in str(second)
    with (
        pytest.raises(VerifierError, match="to return 4 results, but got 0 on 4 responses"),
        early_grading(Broken(list), None) as grading,
    ):
        list(grading.results(asked))


def fail(verifier, workers, error):
    """Let the sampling fail while responses are being graded."""
    with early_grading(verifier, workers) as grading:
        for rollout in rollouts():
            grading.put(rollout)
        time.sleep(0.05)
        raise error


@pytest.mark.parametrize("workers", [None, 2])
def test_after_a_failure_of_sampling_nothing_is_graded_any_more(workers):
    called = []

    def waiting(question, response):
        called.append(response)
        time.sleep(0.1)
        return 1.0

    async def awaiting(question, response):
        called.append(response)
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="out of memory"):
        fail(awaiting if workers is None else waiting, workers, ValueError("out of memory"))
    assert len(called) == (workers or 8)
    assert not [each for each in threading.enumerate() if "verifier" in each.name]


def test_an_interrupt_does_not_wait_for_a_call():
    go = threading.Event()

    class Endless(Batched):
        def grade_batch(self, rollouts, step):
            go.wait(60)
            return [1.0] * len(rollouts)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fail(Endless(), None, KeyboardInterrupt())
    assert time.monotonic() - start < 30
    go.set()


def test_the_process_is_as_it_was(tmp_path):
    class Vandal(Batched):
        def grade_batch(self, rollouts, step):
            os.chdir(tmp_path)
            return [1.0] * len(rollouts)

    before = os.getcwd()
    with early_grading(Vandal(), None) as grading:
        assert len(list(grading.results(rollouts()))) == 8
        assert os.getcwd() == str(tmp_path)
    assert os.getcwd() == before


class Late(TransformersEngine):
    """Returns all responses at the end."""

    hands_over = False


@pytest.mark.parametrize(
    ("verifier", "workers", "wanted", "engine", "early"),
    [
        (CodeExecution(), None, None, TransformersEngine(), True),
        (CodeExecution(), None, False, TransformersEngine(), False),
        (CodeExecution(), None, None, Late(), False),
        (Batched(), None, None, TransformersEngine(), False),
        (Batched(), None, True, TransformersEngine(), True),
        (coroutine, None, None, TransformersEngine(), False),
        (coroutine, None, True, TransformersEngine(), True),
        (plain, 4, True, TransformersEngine(), True),
        (TRLReward([plain]), None, True, TransformersEngine(), True),
        (BoxedAnswer(), None, None, TransformersEngine(), False),
    ],
)
def test_who_grades_early(verifier, workers, wanted, engine, early):
    assert grades_early(verifier, workers, wanted, engine) == early


@pytest.mark.parametrize(
    ("verifier", "wanted", "engine", "message"),
    [
        (plain, True, TransformersEngine(), "at the same time with `reward.while_sampling` true, but plain is called for one"),
        (CodeExecution(), True, Late(), "with `reward.while_sampling` true, but Late returns all of them at the end"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(verifier, wanted, engine, message):
    with pytest.raises(ValueError, match=message):
        grades_early(verifier, None, wanted, engine)


def test_an_engine_hands_over_within_the_context_alone():
    assert Engine.hands_over is False
    engine, taken = TransformersEngine(), []
    with engine.handing_over(taken.append):
        engine.receive(1)
    assert engine.receive is None
    assert taken == [1]
