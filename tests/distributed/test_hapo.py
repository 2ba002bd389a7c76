"""HAPO and DRIFT with two processes are what they are with one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support import hapo_worker


@pytest.mark.parametrize(
    ("method", "curve"), [("hapo", "hapo/injected_groups"), ("drift", "drift/replaced_groups")], ids=["hapo", "drift"]
)
def test_two_processes_are_one(tmp_path, method, curve):
    hapo_worker.main(str(tmp_path / "one"), 1, method)
    subprocess.run(
        [sys.executable, "-m", "tests.support.hapo_worker", str(tmp_path / "two"), "2", method],
        check=True,
        timeout=580,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one = torch.load(tmp_path / "one.0", weights_only=True)
    two = [torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2)]
    assert two[0]["state"] == two[1]["state"] == one["state"]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["weights"], one["start"])
    assert one["scalars"][-1][curve] > 0
    for mine, theirs in zip(one["scalars"], two[0]["scalars"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)
