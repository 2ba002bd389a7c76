"""A resumed teacher moves when and as it would have moved; whole runs with the average in bf16."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from pgpo_lightning.commands.main import main
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.teachers.schedules import RefreshGate
from tests.support.helpers import config, tiny_sdpo
from tests.support.runs import assert_same_run, final
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


def test_a_resumed_run_with_the_average_in_bf16_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    narrow = lambda name, steps=6: config(tmp_path / name, steps, model={"teacher.dtype": "bfloat16"})  # noqa: E731
    main(["fit", "--config", narrow("whole")])
    main(["fit", "--config", narrow("broken", 3)])
    main(["fit", "--config", narrow("broken"), "--ckpt_path", "last"])
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    saved = final(tmp_path / "whole")
    teacher = {name: value for name, value in saved["state_dict"].items() if name.startswith("teacher.model.")}
    assert {value.dtype for value in teacher.values()} == {torch.bfloat16}
    updates = saved["state_dict"]["teacher._extra_state"]["updates"]
    assert 3 < updates <= 6
    with pytest.raises(MisconfigurationException, match=r"`model.teacher.dtype` is None and was 'bfloat16'"):
        main(["fit", "--config", config(tmp_path / "broken", 7), "--ckpt_path", "last"])
    main(["export", str(tmp_path / "whole"), str(tmp_path / "out"), "--weights", "teacher", "--tokenizer", "toy"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, teacher[f"teacher.model.{name}"]) for name, p in model.named_parameters())
