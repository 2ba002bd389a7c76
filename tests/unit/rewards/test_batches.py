"""Verifiers called in threads, as coroutines and with whole batches: the results and errors are those of single calls."""

import asyncio
import os
import signal
import sys
import threading
import time

import pytest
import torch

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.rewards.batches import check_workers, graded
from pgpo_lightning.training.actor import Actor
from pgpo_lightning.training.configs import RewardConfig


def rollouts(n=8, siblings=2):
    return [
        Rollout(
            Question("What is it?", str(i // siblings), index=i // siblings, source=f"train.json:{i // siblings + 1}"),
            [1, 2],
            [3] * (i + 1),
            torch.zeros(i + 1),
            f"text {i}",
            True,
        )
        for i in range(n)
    ]


def plain(question, response):
    if response == "text 5":
        raise ValueError("broken")
    return float(response[-1]) / 10, f"{question.answer}: {response}"


async def coroutine(question, response):
    await asyncio.sleep(0.01 * (7 - int(response[-1])))  # the last one ends first
    return plain(question, response)


def slow(question, response):
    time.sleep(0.01 * (7 - int(response[-1])))
    return plain(question, response)


class Batched:
    def __init__(self):
        self.steps = []

    def __call__(self, question, response):
        raise AssertionError("never called")

    def grade_batch(self, rollouts, step):
        self.steps.append(step)
        results = []
        for rollout in rollouts:
            try:
                results.append(plain(rollout.question, rollout.text))
            except ValueError as error:
                results.append(error)
        return results


class AsyncBatched(Batched):
    async def grade_batch(self, rollouts, step):
        return await asyncio.sleep(0, super().grade_batch(rollouts, step))


WAYS = [(plain, 3), (slow, 8), (coroutine, None), (coroutine, 2), (Batched(), None), (AsyncBatched(), None)]


@pytest.mark.parametrize(
    ("verifier", "workers"), WAYS, ids=["threads", "slow", "async", "async 2", "batch", "async batch"]
)
def test_results_and_errors_are_those_of_single_calls(verifier, workers):
    single = list(graded(plain, rollouts()))
    several = list(graded(verifier, rollouts(), workers))
    assert [each for each in single if isinstance(each, Verdict)] == [
        each for each in several if isinstance(each, Verdict)
    ]
    assert len(several) == 8
    assert str(several[5]).endswith("raised ValueError on question 2 of train.json:3 ('What is it?'): broken")
    assert isinstance(several[5].__cause__, ValueError)


def test_no_rollouts_are_no_call():
    assert list(graded(lambda question, response: 1 / 0, [])) == []


def test_threads_work_at_the_same_time_and_no_more_than_allowed():
    running, most, lock = 0, 0, threading.Lock()

    def counting(question, response):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 1.0

    assert list(graded(counting, rollouts(), 4)) == [Verdict(1.0)] * 8
    assert most == 4
    most = 0
    assert list(graded(counting, rollouts())) == [Verdict(1.0)] * 8
    assert most == 1


def test_an_async_verifier_runs_beside_a_running_loop():
    async def cell():  # as in a notebook
        return list(graded(coroutine, rollouts(4)))

    assert [verdict.reward for verdict in asyncio.run(cell())] == [0.0, 0.1, 0.2, 0.3]


def test_the_process_is_as_it_was_after_threads(tmp_path):
    def vandal(question, response):
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        sys.stdout = None
        return 1.0

    before = os.getcwd(), torch.get_default_dtype(), sys.stdout
    assert list(graded(vandal, rollouts(), 4)) == [Verdict(1.0)] * 8
    assert (os.getcwd(), torch.get_default_dtype(), sys.stdout) == before


def test_a_question_cannot_be_changed():
    asked = rollouts()

    class Vandal(Batched):
        def grade_batch(self, rollouts, step):
            for rollout in rollouts:
                rollout.question.answer = "else"
                rollout.question.columns["new"] = 1
                rollout.response_ids.clear()
            return [1.0] * len(rollouts)

    list(graded(Vandal(), asked))
    for rollout, before in zip(asked, rollouts(), strict=True):
        assert rollout.question == before.question
        assert rollout.response_ids == before.response_ids


@pytest.mark.parametrize("workers", [None, 2])
def test_ctrl_c_ends_the_run_while_others_judge(workers):
    def waiting(question, response):
        time.sleep(0.2)
        if response == "text 0":
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    async def awaiting(question, response):
        await asyncio.sleep(0.01)
        if response == "text 0":
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        list(graded(awaiting if workers is None else waiting, rollouts(), workers))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_batch_that_fails_as_a_whole_names_its_first_question_and_its_size():
    class Broken(Batched):
        def grade_batch(self, rollouts, step):
            raise SystemExit(3)

    errors = list(graded(Broken(), rollouts()))
    assert len(errors) == 8
    assert str(errors[7]).endswith(
        "Broken raised SystemExit on 8 responses to 4 questions, the first question 0 of train.json:1 ('What is it?'): 3"
    )

    class Short(Batched):
        def grade_batch(self, rollouts, step):
            return [1.0]

    with pytest.raises(
        VerifierError, match=r"Expected `grade_batch` of verifier .*Short to return 8 results, but got 1 on 8 resp"
    ):
        list(graded(Short(), rollouts()))


def test_a_result_of_a_batch_that_is_no_reward_names_its_question():
    class Odd(Batched):
        def grade_batch(self, rollouts, step):
            return [1.0] * 3 + ["much"] + [1.0] * 4

    results = list(graded(Odd(), rollouts()))
    assert "but got 'much' on question 1 of train.json:2" in str(results[3])
    assert results[4] == Verdict(1.0)


def test_the_actor_raises_the_first_error_in_order_or_counts_all():
    def bad(question, response):
        if int(response[-1]) in (2, 5):
            time.sleep(0.05 if response[-1] == "2" else 0)
            raise ValueError(response)
        return 1.0

    def actor(**settings):
        return Actor(None, bad, None, None, 8, RewardConfig(workers=4, **settings))

    with pytest.raises(VerifierError, match=r"question 1 of train.json:2 .*: text 2"):
        actor().judge(rollouts())
    lenient = actor(on_error="zero")
    with pytest.warns(UserWarning, match="The first time: Verifier .*text 2"):
        verdicts = lenient.judge(rollouts())
    assert [verdict.reward for verdict in verdicts] == [1, 1, 0, 1, 1, 0, 1, 1]
    lenient.count_verifier_errors()
    assert lenient.verifier_errors == 2


def test_workers_without_effect_are_refused():
    check_workers(plain, 4)
    check_workers(Batched(), None)
    with pytest.raises(
        ValueError, match=r"Expected no `reward.workers` with verifier Batched, .* but got 4. Remove it."
    ):
        check_workers(Batched(), 4)
