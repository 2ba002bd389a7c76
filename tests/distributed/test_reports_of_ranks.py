"""What a step reports is the same on all ranks, and about all of them."""

import pytest
import torch

from tests.support.processes import finish, start_ranks


def test_counts_and_spreads_are_those_of_all_ranks_together_and_survive_a_resume(tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    finish(*start_ranks(["tests.support.reporting_worker", output, 2], log, 2), log=log)
    one, two = (torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2))
    # Rank 0 fails on one response of each batch, rank 1 on two; evaluation on one of each rank. Batch 3 follows a resume.
    for rank in (one, two):
        assert rank["errors"] == [3, 6, 8 + 3]
    advantages = torch.cat(
        [torch.cat([rank["advantages"][step] for rank in (one, two)]).view(1, -1) for step in range(3)]
    )
    for rank in (one, two):
        assert rank["std"] == pytest.approx(advantages.std(1).tolist(), rel=1e-5)
    mean = torch.stack(
        [torch.stack([rank["advantages"][step].std() for rank in (one, two)]).mean() for step in range(3)]
    )
    assert (advantages.std(1) - mean).abs().max() > 1e-3, "or the test could not fail"
    assert one["seconds"] == two["seconds"]
