"""Attempts of the base model: they end with the first success, and go on where they were."""

import pytest

from pgpo_lightning.core.types import Verdict
from pgpo_lightning.discovery.attempts import AttemptsFile
from pgpo_lightning.discovery.base_runs import BaseRuns
from tests.support.helpers import questions, tiny_sdpo


class After:
    """A verifier whose n-th verdict is a success."""

    def __init__(self, n):
        self.left = n

    def __call__(self, question, response):
        self.left -= 1
        return Verdict(float(self.left == 0), feedback="no")


@pytest.mark.parametrize(("kind", "size", "made"), [("best-of-k", 4, 8), ("feedback", 1, 6), ("turns", 1, 6)])
def test_a_run_ends_with_its_first_success(tmp_path, kind, size, made):
    module = tiny_sdpo(verifier=After(6), max_response_length=3, max_reprompt_len=400)
    file = AttemptsFile(tmp_path, size)
    BaseRuns(module, size).run(kind, questions(1)[0], 5, file, budget=20, stop=True)
    assert [each.number for each in file.read() if each.success] == [6]
    assert len(file.read()) == made


@pytest.mark.parametrize(("kind", "size"), [("best-of-k", 2), ("feedback", 1), ("turns", 1)])
def test_a_run_in_parts_is_the_run_in_one(tmp_path, kind, size):
    module = tiny_sdpo(verifier=After(0), max_response_length=3, max_reprompt_len=100)
    whole, parts = AttemptsFile(tmp_path / "whole", size), AttemptsFile(tmp_path / "parts", size)
    runs, question = BaseRuns(module, size), questions(1)[0]
    runs.run(kind, question, 5, whole, budget=6, stop=True)
    runs.run(kind, question, 5, parts, budget=2, stop=True)
    runs.run(kind, question, 5, parts, budget=6, stop=True)
    told = [[(each.number, each.text, each.prompt_tokens) for each in file.read()] for file in (whole, parts)]
    assert told[0] == told[1]
    assert len({text for _, text, _ in told[0]}) > 1
