"""Runs of CEPO, DRIFT and TGPO with an adapter: resumed, and with the teacher that their page names."""

from pathlib import Path

import pytest
import torch
import yaml

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.external import LARGER, saved
from tests.support.helpers import config
from tests.support.runs import assert_same, final

PGPO = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 5.0, "rho_min": None, "rho_max": 5.0}}
SMALL = {"lora": {"r": 4, "lora_alpha": 8}, "num_generations": 4}
METHODS = {
    "CEPO": ({}, "self_distillation/contrasted_fraction"),
    "DRIFT": ({"difficulty": {"warmup_steps": 1, "hard": 0.1}}, "self_distillation/routed_fraction"),
    "TGPO": ({"guidance": 0.5}, "self_distillation/guidance"),
}


def run(folder, method, steps, *args):
    settings = SMALL | METHODS[method][0]
    if method == "TGPO":
        settings["teacher"] = {"model": str(folder.parent / "teacher")}
    path = Path(config(folder, steps, module=method, model=settings, multiplier=PGPO))
    content = yaml.safe_load(path.read_text())
    if method == "TGPO":
        del content["model"]["init_args"]["reprompt"]  # the teacher reads the student's prompt
    content["trainer"] |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    path.write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(path), *args])


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_whole_one_and_has_the_teacher_of_its_page(tmp_path, method):
    if method == "TGPO":
        saved(tmp_path / "teacher", **LARGER)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, method, 3)
    run(cut, method, 2)
    run(cut, method, 3, "--ckpt_path", "last")
    before, after, resumed = final(whole, 2), final(whole, 3), final(cut, 3)
    for part in ("state_dict", "optimizer_states", "ToyArithmetic", "pgpo_lightning", "global_step"):
        assert_same(after[part], resumed[part], part)
    curves = read_scalars(whole)
    assert min(curves["actor/grad_norm"].values()) > 0
    assert set(curves["lr/multiplier"].values()) != {1.0}
    assert max(curves[METHODS[method][1]].values()) > 0

    state = after["state_dict"]
    student = {name for name in state if name.startswith("model.")}
    assert all(".lora_A." in name or ".lora_B." in name for name in student)
    assert not any(torch.equal(state[name], before["state_dict"][name]) for name in student if ".lora_B." in name)
    teacher = {name: value for name, value in state.items() if name.startswith("teacher.")}
    if method == "DRIFT":  # an adapter of its own, the average of the student's
        assert {name.removeprefix("teacher.") for name in teacher} == student
        for name, average in teacher.items():
            old, now = before["state_dict"][name], state[name.removeprefix("teacher.")]
            torch.testing.assert_close(average, 0.95 * old + 0.05 * now, rtol=1e-6, atol=1e-8)
    else:  # the student itself, or another model, of which the fingerprint alone is saved
        assert list(teacher) == ([] if method == "CEPO" else ["teacher._extra_state"])
