"""Ranks leave out a step without a signal together, or not at all."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.support.processes import finish, start_ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_leave_out_a_step_only_together(tmp_path, strategy):
    """Batches 0 and 4: both ranks have a signal; 1: rank 0 alone; 2: rank 1 alone; 3: none."""
    output, log = tmp_path / "out", tmp_path / "log"
    finish(*start_ranks(["tests.support.no_signal_worker", output, 2, strategy], log, 2), log=log)
    one, two = (torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2))
    assert one["left_out"] == two["left_out"] == 1
    assert one["history"] == two["history"]
    assert len(one["history"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(one["weights"])]
    assert moved == [True, True, False, True]
    told = Path(f"{log}.0").read_text()
    assert "Step 4: no rollout is in the loss, so no optimizer step was taken (1 so far). 0 of 16 rollouts" in told
