"""A run with sharded weights is the run with whole ones, also when one of its processes is killed on the way."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from pgpo_lightning.checkpoints.sharded import read_shards
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support import ROOT
from tests.support.helpers import config
from tests.support.processes import finish, start_ranks

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
    command = [sys.executable, "-m", "pgpo_lightning.commands.main", *words(*args)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def run(folder, *args):
    log = folder.with_suffix(".log")
    finish(*start_ranks(["pgpo", *words(folder, *args)], log, 2), log=log)


def until_killed(folder, has_ended, kill):
    """Kill something of a run when it has written its second checkpoint."""
    while not (folder / "checkpoints" / "step=000002.ckpt").exists():
        assert not has_ended(), "the run ended by itself"
        time.sleep(0.05)
    kill()


def assert_same_runs(folder, reference, load):
    last = f"checkpoints/step={STEPS:06d}.ckpt"
    ours, theirs = load(folder / last), torch.load(reference / last, weights_only=True)
    ours["state_dict"].pop("teacher._extra_state", None)  # of a frozen teacher, which FSDP2 leaves out
    theirs["state_dict"].pop("teacher._extra_state", None)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weights in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weights, rtol=0, atol=1e-5)
    a, b = read_scalars(folder), read_scalars(reference)
    assert all(b["actor/grad_norm"][step] > 0 for step in range(1, STEPS + 1)), "nothing was learnt"
    for tag in ("critic/score/mean", "val/avg@2", "information/mean", "lr/multiplier", "actor/grad_norm"):
        assert a[tag] == pytest.approx(b[tag], rel=1e-3, abs=1e-5), tag


@pytest.mark.timeout(900)
def test_a_sharded_run_that_loses_rank_0_resumes_from_its_shards_to_what_ddp_gives(tmp_path):
    """As a user starts it: Lightning makes rank 1 a child of rank 0."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "ddp")
    strategy = FSDP2 | {"init_args": FSDP2["init_args"] | {"save_distributed_checkpoint": True}}
    process = launch(broken, strategy)
    until_killed(broken, lambda: process.poll() is not None, process.kill)
    process.communicate(timeout=60)  # not before both have ended: they write into the same pipe
    assert process.returncode != 0
    assert not (broken / "checkpoints" / f"step={STEPS:06d}.ckpt").exists(), "the run ended before it was killed"
    run(broken, strategy, "--ckpt_path", "last")
    assert_same_runs(broken, whole, read_shards)


@pytest.mark.timeout(900)
def test_a_sharded_teacher_in_bf16_continues_from_a_file_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    narrow = ("--model.teacher.dtype", "bfloat16")
    run(whole, FSDP2, *narrow)
    run(broken, FSDP2, *narrow, "--trainer.max_steps", "2")
    run(broken, FSDP2, *narrow, "--ckpt_path", "last")
    ours, theirs = (torch.load(f / f"checkpoints/step={STEPS:06d}.ckpt", weights_only=True) for f in (broken, whole))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert ours["state_dict"].pop("teacher._extra_state") == theirs["state_dict"].pop("teacher._extra_state")
    assert all(torch.equal(ours["state_dict"][name], weights) for name, weights in theirs["state_dict"].items())
    teacher = "teacher.model.model.layers.0.mlp.up_proj.weight"
    assert ours["state_dict"][teacher].dtype == torch.bfloat16
    assert not torch.equal(ours["state_dict"][teacher], ours["state_dict"][teacher.removeprefix("teacher.")].bfloat16())


@pytest.mark.timeout(900)
def test_a_ddp_run_that_loses_rank_1_resumes_with_sharded_weights_from_its_file(tmp_path):
    """As a cluster starts it: all ranks by themselves."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ("--model.teacher.regularization", "frozen")
    run(whole, "ddp", *settings)
    first, second = start_ranks(["pgpo", *words(broken, "ddp", *settings)], broken.with_suffix(".log"), 2)
    until_killed(broken, lambda: not (first.is_alive() and second.is_alive()), second.kill)
    first.join(timeout=60)
    assert first.exitcode not in (None, 0)
    assert not (broken / "checkpoints" / f"step={STEPS:06d}.ckpt").exists(), "the run ended before it was killed"
    run(broken, FSDP2, *settings, "--ckpt_path", "last")
    assert_same_runs(broken, whole, partial(torch.load, weights_only=True))
