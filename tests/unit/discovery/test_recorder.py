"""The callbacks of a run that trains: what is written, when it ends, and weights that are put back."""

from types import SimpleNamespace

import pytest
import torch

from pgpo_lightning.discovery.attempts import AttemptsFile
from pgpo_lightning.discovery.recorder import AttemptRecorder
from pgpo_lightning.discovery.reset_weights import ResetWeights
from tests.support.helpers import random_rows

SECONDS = {"timing_s/gen": 1.0, "timing_s/reward": 0.5, "timing_s/step": 4.0}


def step(recorder, number, rewards, taught=True):
    """The end of a training step with these rewards; returns whether the run is to stop."""
    rows = random_rows(len(rewards), with_reprompt=taught)
    for row, reward in zip(rows, rewards, strict=True):
        row.verdict.reward = reward
    reward = SimpleNamespace(success_threshold=1.0)
    module = SimpleNamespace(last_samples=rows, steps=number, reported=SECONDS, reward=reward)
    trainer = SimpleNamespace(should_stop=False)
    recorder.on_train_batch_end(trainer, module, None, None, 0)
    return trainer.should_stop


def test_a_run_stops_at_its_first_success_and_not_before(tmp_path):
    recorder = AttemptRecorder(str(tmp_path), 2)
    recorder.on_train_start(None, None)
    assert [step(recorder, 1, [0.0, 0.5]), step(recorder, 2, [0.0, 1.0])] == [False, True]
    attempts = AttemptsFile(tmp_path, 2).read()
    assert [(each.number, each.success) for each in attempts] == [(1, False), (2, False), (3, False), (4, True)]
    assert (attempts[0].seconds, attempts[0].update_seconds) == (0.75, 1.25)
    assert not step(AttemptRecorder(str(tmp_path / "on"), 2, stop=False), 1, [1.0, 1.0])


def test_a_step_that_is_made_again_is_not_written_again(tmp_path):
    first = AttemptRecorder(str(tmp_path), 2)
    for number in (1, 2, 3):
        step(first, number, [0.0, 0.0])
    resumed = AttemptRecorder(str(tmp_path), 2)
    resumed.on_train_start(None, None)
    for number in (3, 4):
        step(resumed, number, [0.0, 0.0])
    assert [each.number for each in AttemptsFile(tmp_path, 2).read()] == list(range(1, 9))


def test_no_teacher_in_the_first_step_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`verifier` to give feedback"):
        step(AttemptRecorder(str(tmp_path), 2), 1, [0.0, 0.0], taught=False)
    assert not list(tmp_path.iterdir())
    assert step(AttemptRecorder(str(tmp_path), 2), 1, [0.0, 1.0], taught=False), "a success needs no feedback"


def test_every_update_is_taken_from_the_initial_weights():
    model = torch.nn.Linear(2, 1, bias=False)
    initial = model.weight.detach().clone()
    module, callback = SimpleNamespace(model=model), ResetWeights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    callback.on_fit_start(None, module)
    for gradient in (1.0, 1.0, -1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        callback.on_before_optimizer_step(None, module, optimizer)
        optimizer.step()
        # Adam's first step has the length of the rate: neither weights nor moments have added up.
        torch.testing.assert_close(model.weight.detach(), initial - 0.1 * gradient)
    resumed = ResetWeights()
    resumed.load_state_dict(callback.state_dict())
    resumed.on_fit_start(None, module)
    resumed.on_before_optimizer_step(None, module, optimizer)
    torch.testing.assert_close(model.weight.detach(), initial)
