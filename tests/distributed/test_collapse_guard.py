"""Two ranks roll back at the same step to the same weights."""

import torch

from tests.support.processes import finish, start_ranks


def test_ranks_decide_alike(tmp_path):
    output = tmp_path / "state"
    finish(*start_ranks(["tests.support.stability_worker", output, 2], tmp_path / "log", 2), log=tmp_path / "log")
    a, b = (torch.load(f"{output}.{rank}") for rank in (0, 1))
    assert a["rollbacks"] == b["rollbacks"] == [[6, 2], [8, 2]]
    assert a["steps"] == b["steps"] == 8
    assert a["curves"] == b["curves"]
    assert torch.equal(a["weights"], b["weights"])
    assert torch.equal(a["weights"], a["best"])
