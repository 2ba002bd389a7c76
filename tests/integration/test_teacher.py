"""A resumed teacher moves when and as it would have moved."""

import copy

import pytest
import torch

from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.teachers.schedules import RefreshGate
from tests.support.helpers import tiny_sdpo
from tests.support.teachers import GATE, outcome, weights


@pytest.mark.parametrize("kind", ["restart", "gated"])
@pytest.mark.parametrize("cut", [1, 4, 6])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_resumed_teacher_moves_when_and_as_it_would_have(kind, cut, with_adapter):
    settings = {"teacher_regularization": kind}
    settings |= {"teacher_period": 3} if kind == "restart" else {"teacher_gate": RefreshGate(**GATE)}
    if with_adapter:
        pytest.importorskip("peft")
        settings["lora"] = LoRA(r=2)
    rewards = [0.0, 0.1, 0.4, 0.4, 0.4, 0.4, 0.9, 0.9]
    make = lambda: tiny_sdpo(**settings)  # noqa: E731
    module, moves = make(), []
    for step, reward in enumerate(rewards):
        if step == cut:
            saved, student = copy.deepcopy(module.state_dict()), copy.deepcopy(module.model)
        before = weights(module.teacher.model)
        outcome(module, reward)
        moves += [step] * (not torch.equal(before, weights(module.teacher.model)))
    assert len(moves) == 2
    resumed = make()
    resumed.load_state_dict(saved)
    assert torch.equal(weights(resumed.model), weights(student))
    for reward in rewards[cut:]:
        outcome(resumed, reward)
    assert torch.equal(weights(resumed.teacher.model), weights(module.teacher.model))
    assert resumed.teacher.get_extra_state() == module.teacher.get_extra_state()
