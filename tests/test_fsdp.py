"""The loss in a model sharded over two processes gives the gradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).parent / "fsdp_worker.py"


def gradients(folder, ranks):
    output = folder / f"{ranks}.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(output), str(ranks)],
        check=True,
        timeout=200,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return torch.load(output, weights_only=True)


def test_two_sharded_processes_equal_one(tmp_path):
    one, two = gradients(tmp_path, 1), gradients(tmp_path, 2)
    assert (
        set(one) == set(two) == {f"{head} {mode}" for head in ("tied", "untied") for mode in ("at once", "recomputed")}
    )
    for case, expected in one.items():
        assert set(expected) == set(two[case])
        assert any("lm_head" in name for name in expected) == case.startswith("untied")
        for name, gradient in expected.items():
            assert gradient.norm() > 0
            assert (two[case][name] - gradient).norm() / gradient.norm() < 2e-6, (case, name)
