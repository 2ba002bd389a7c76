"""HAPO, DRIFT and I-SDPO with two processes are what they are with one."""

import pytest
import torch

from tests.support import hapo_worker
from tests.support.processes import finish, start_ranks


@pytest.mark.parametrize(
    ("method", "curve"),
    [
        ("hapo", "hapo/injected_groups"),
        ("drift", "drift/replaced_groups"),
        ("i-sdpo", "self_distillation/routed_fraction"),
    ],
    ids=["hapo", "drift", "i-sdpo"],
)
def test_two_processes_are_one(tmp_path, method, curve):
    hapo_worker.main(str(tmp_path / "one"), 1, method)
    log = tmp_path / "log"
    finish(*start_ranks(["tests.support.hapo_worker", tmp_path / "two", 2, method], log, 2), log=log)
    one = torch.load(tmp_path / "one.0", weights_only=True)
    two = [torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2)]
    assert two[0]["state"] == two[1]["state"] == one["state"]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["weights"], one["start"])
    assert max(scalars[curve] for scalars in one["scalars"]) > 0
    for mine, *theirs in zip(one["scalars"], *(rank["scalars"] for rank in two), strict=True):
        assert {name: (theirs[0][name] + theirs[1][name]) / 2 for name in mine} == pytest.approx(mine, rel=1e-5)
