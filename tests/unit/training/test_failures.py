"""A run whose rollouts never succeed is told so, and what to change."""

import warnings
from types import SimpleNamespace

import pytest

from pgpo_lightning.core.types import Verdict
from pgpo_lightning.training.configs import RewardConfig
from pgpo_lightning.training.step_report import STEPS_WITHOUT_SUCCESS, StepReporter
from tests.support.helpers import random_rows


def reporter(source="siblings", feedback=True, teaching=True):
    builder = SimpleNamespace(demonstration_source=source, include_environment_feedback=feedback)
    objective = SimpleNamespace(teaching=SimpleNamespace(builder=builder) if teaching else None)
    return StepReporter(objective, SimpleNamespace(reward=RewardConfig()), 2, 12)


def told(made, successes, reward=0.0, feedback=None):
    rows = random_rows(4)
    for i, row in enumerate(rows):
        row.verdict = Verdict(reward if i else 0.0, feedback)
    said = []
    for success in successes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made._warn_of_failures(rows, success)
        said.append([str(warning.message) for warning in caught])
    return said


def test_the_warning_comes_after_ten_steps_in_a_row_and_again_after_ten_more():
    assert STEPS_WITHOUT_SUCCESS == 10
    said = told(reporter(), [0.0] * 9 + [0.25] + [0.0] * 25)
    assert [step for step, each in enumerate(said, start=1) if each] == [20, 30]
    assert said[29][0].startswith(
        "No rollout of the last 20 steps reached `reward.success_threshold` (0.5; rewards of this"
    )


@pytest.mark.parametrize(
    ("settings", "outcome", "wanted", "unwanted"),
    [
        (
            {},
            {"reward": 0.3},
            ["lower the threshold to at most 0.3", "the teacher reads nothing", "give feedback"],
            ["cut off"],
        ),
        (
            {},
            {"feedback": "Wrong."},
            ["feedback alone", "take easier questions"],
            ["lower the threshold", "give feedback"],
        ),
        ({"feedback": False}, {"feedback": "Wrong."}, ["the teacher reads nothing"], []),
    ],
)
def test_it_says_what_helps(settings, outcome, wanted, unwanted):
    [text] = told(reporter(**settings), [0.0] * 10, **outcome)[-1]
    assert all(part in text for part in wanted), text
    assert not any(part in text for part in unwanted), text


def test_a_step_without_any_loss_is_explained_elsewhere():
    made = reporter()
    for _ in range(STEPS_WITHOUT_SUCCESS):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made._warn_of_failures(random_rows(4), 0.0, explained=True)


@pytest.mark.parametrize("settings", [{"teaching": False}, {"source": "none"}])
def test_without_demonstrations_there_is_no_warning(settings):
    assert not any(told(reporter(**settings), [0.0] * 20))
