"""A run that is killed and resumed is bit for bit the run that was not."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.commands.main import main
from tests.support.helpers import TOKENIZER, config, tiny_model
from tests.support.processes import start
from tests.support.runs import assert_same_run, final


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", "--config", config(folder)])
    return folder


@pytest.mark.parametrize("cut", [2, 3, 5])
def test_resume_from_every_step(whole, tmp_path, cut):
    """2 is followed by a validation, 3 ends an epoch, 5 is neither."""
    folder = tmp_path / "run"
    main(["fit", "--config", config(folder, steps=cut)])
    main(["fit", "--config", config(folder), "--ckpt_path", "last"])
    assert_same_run(whole, folder)


@pytest.mark.timeout(300)
def test_resume_after_kill_nine(whole, tmp_path):
    """Killed at a moment that nobody chose, in the middle of whatever it was doing."""
    folder = tmp_path / "run"
    process = start(["pgpo", "fit", "--config", config(folder)], tmp_path / "log")
    checkpoints = folder / "checkpoints"
    while not (checkpoints.is_dir() and len(list(checkpoints.glob("step=*.ckpt"))) >= 3):
        assert process.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.15)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (checkpoints / "step=000006.ckpt").exists(), "the run ended before it was killed"
    main(["fit", "--config", config(folder), "--ckpt_path", "last"])
    assert_same_run(whole, folder)


def test_a_checkpoint_holds_the_teacher_and_nothing_that_needs_pickle(whole):
    saved = final(whole)
    names = saved["state_dict"]
    assert {name.split(".")[0] for name in names} == {"model", "teacher"}
    student = names["model.model.layers.0.mlp.up_proj.weight"]
    teacher = names["teacher.model.model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(student, teacher)
    assert saved["lr_schedulers"][0]["last_epoch"] == 6
    # The rates that the optimizer and the schedule keep never saw the multiplier.
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.9**6, rel=1e-12)


def test_a_run_in_the_folder_of_another_is_refused_and_loses_nothing(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"holds one. Continue it with `--ckpt_path last`"):
        main(["fit", "--config", config(whole)])
    after = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before


def test_resuming_where_there_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="to resume from, but there is none"):
        main(["fit", "--config", config(tmp_path / "run"), "--ckpt_path", "last"])


def test_settings_of_the_command_line_win_over_those_of_the_checkpoint(whole, tmp_path):
    checkpoint = str(whole / "checkpoints" / "step=000006.ckpt")
    main(
        ["validate", "--config", config(tmp_path / "run"), "--ckpt_path", checkpoint, "--model.evaluation.samples", "3"]
    )
    (record,) = (tmp_path / "run" / "validate").glob("step=000006-*.json")
    assert json.loads(record.read_text())["samples"] == 3


def test_a_checkpoint_of_another_module_or_architecture_is_refused(whole, tmp_path):
    checkpoint = str(whole / "checkpoints" / "step=000006.ckpt")
    grpo = config(tmp_path / "a", module="GRPO")
    settings = yaml.safe_load(Path(grpo).read_text())
    del settings["model"]["init_args"]["reprompt"]
    Path(grpo).write_text(yaml.safe_dump(settings))
    with pytest.raises(MisconfigurationException, match=r"Expected a checkpoint of GRPO, but it is SDPO's"):
        main(["validate", "--config", grpo, "--ckpt_path", checkpoint])
    tiny_model().save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    with pytest.raises(MisconfigurationException, match=r"of another architecture: hidden_size 128 instead of 32"):
        main(
            [
                "validate",
                "--config",
                config(tmp_path / "b", model={"model": str(tmp_path / "tiny")}),
                "--ckpt_path",
                checkpoint,
            ]
        )


def test_export_opens_with_transformers_alone(whole, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["export", str(whole), str(tmp_path / "student")])
    main(["export", str(whole), str(tmp_path / "teacher"), "--weights", "teacher", "--tokenizer", "toy"])
    saved = final(whole)["state_dict"]
    for kind, prefix in (("student", "model."), ("teacher", "teacher.model.")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved[prefix + name]), name
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert tokenizer.decode(tokenizer("8*6=48")["input_ids"]) == "8*6=48"
