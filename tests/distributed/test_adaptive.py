"""Adaptive multipliers agree between two ranks and one."""

import pytest
import torch

from tests.support.adaptive_worker import WORKERS, worker
from tests.support.processes import finish, start_ranks


@pytest.mark.parametrize("name", WORKERS)
def test_two_processes_equal_one(tmp_path, name):
    worker(tmp_path / "out1", 1, name)
    finish(
        *start_ranks(["tests.support.adaptive_worker", tmp_path / "out2", 2, name], tmp_path / "log", 2),
        log=tmp_path / "log",
    )
    one, two, other = (torch.load(tmp_path / out, weights_only=True) for out in ("out1.0", "out2.0", "out2.1"))
    assert torch.equal(two["weights"], other["weights"])
    assert two["rho"] == other["rho"]
    assert len(set(one["rho"])) == 3, "the multiplier must move for the comparison to mean anything"
    assert two["rho"] == pytest.approx(one["rho"], rel=1e-3)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=3e-4)
    assert (two["weights"] - one["weights"]).abs().mean() < 1e-6
