"""A run with sharded weights is the run with whole ones, also when one of its processes is killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import config, tiny_model, tiny_sdpo
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from processes import finish, start_ranks

from pgpo_lightning.curves import read_scalars
from pgpo_lightning.sharding import Sharded
from pgpo_lightning.shards import read_shards

ROOT = Path(__file__).parent.parent
STEPS = 4
FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


def words(folder, strategy, *args):
    path = config(folder, STEPS, model={"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}})
    settings = yaml.safe_load(Path(path).read_text())
    settings["trainer"] |= {"devices": 2, "strategy": strategy}
    settings["data"]["init_args"]["batch_size"] = 2
    Path(path).write_text(yaml.safe_dump(settings))
    return ["fit", "--config", path, *args]


def launch(*args):
    """Return rank 0 of a run as a user starts it; it starts the other itself."""
    command = [sys.executable, "-m", "pgpo_lightning.cli", *words(*args)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def run(folder, *args):
    log = folder.with_suffix(".log")
    finish(*start_ranks(["pgpo", *words(folder, *args)], log, 2), log=log)


def process_of(rank, process):
    """Return the process id of a rank; Lightning starts rank 1 as a child of rank 0."""
    if rank == 0:
        return process.pid
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and f"PPid:\t{process.pid}\n" in (folder / "status").read_text():
            variables = (folder / "environ").read_bytes().split(b"\0")
            if b"LOCAL_RANK=1" in variables and b"pgpo_lightning.cli" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("rank 1 is not there")


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the second process in /proc")
@pytest.mark.parametrize(("killed", "as_folder", "teacher"), [(1, False, "frozen"), (0, True, "ema")])
def test_a_sharded_run_that_loses_a_rank_resumes_to_what_ddp_gives(tmp_path, killed, as_folder, teacher):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ("--model.teacher_regularization", teacher)
    run(whole, "ddp", *settings)
    strategy = FSDP2 | {"init_args": FSDP2["init_args"] | {"save_distributed_checkpoint": as_folder}}
    process = launch(broken, strategy, *settings)
    while not (broken / "checkpoints" / "step=000002.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.kill(process_of(killed, process), signal.SIGKILL)
    at = time.monotonic()
    process.communicate(timeout=60)  # not before both have ended: they write into the same pipe
    assert process.returncode != 0
    assert time.monotonic() - at < 60
    assert not (broken / "checkpoints" / f"step={STEPS:06d}.ckpt").exists(), "the run ended before it was killed"
    run(broken, strategy, *settings, "--ckpt_path", "last")

    last = f"checkpoints/step={STEPS:06d}.ckpt"
    assert (broken / last).is_dir() == as_folder
    ours = read_shards(broken / last) if as_folder else torch.load(broken / last, weights_only=True)
    theirs = torch.load(whole / last, weights_only=True)
    ours["state_dict"].pop("teacher._extra_state", None)
    theirs["state_dict"].pop("teacher._extra_state", None)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weights in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weights, rtol=0, atol=1e-5)
    a, b = read_scalars(broken), read_scalars(whole)
    assert all(b["actor/grad_norm"][step] > 0 for step in range(1, STEPS + 1)), "nothing was learnt"
    for tag in ("critic/score/mean", "val/avg@2", "information/mean", "lr/multiplier", "actor/grad_norm"):
        assert a[tag] == pytest.approx(b[tag], rel=1e-3, abs=1e-5), tag


def test_a_precision_that_scales_gradients_is_refused():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(
        MisconfigurationException, match=r"bf16-mixed or bf16-true with sharded weights, but got 16-mixed"
    ):
        Sharded(tiny_model(), None, None, precision)


def test_a_model_without_named_layers_is_refused():
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(
        MisconfigurationException, match=r"Qwen3ForCausalLM to name its layers .* `trainer.strategy` to ddp"
    ):
        Sharded(model, None, None, Precision())


def test_an_evaluation_with_sharded_weights_takes_a_checkpoint_whose_weights_are_loaded_already():
    module = tiny_sdpo()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.teacher, module.steps = None, 7
    module.on_load_checkpoint(checkpoint)
    assert module.steps == 0
    assert "state_dict" not in checkpoint
