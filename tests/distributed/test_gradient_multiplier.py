"""Two ranks under a multiplier of the gradient take the steps of a loop written by hand, bit for bit."""

import pytest
import torch

from tests.support.fixed_gradients import RHO, gradient_loop
from tests.support.gradient_worker import CLIP, OPTIMIZERS
from tests.support.processes import finish, start_ranks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_equal_the_loop(tmp_path, name):
    finish(
        *start_ranks(["tests.support.gradient_worker", tmp_path / "out", name], tmp_path / "log", 2),
        log=tmp_path / "log",
    )
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, gradient_loop(OPTIMIZERS[name], RHO, CLIP, ranks=2))
