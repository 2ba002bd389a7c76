"""The loss in a model sharded over two processes gives the gradients of one process."""

import torch

from tests.support.processes import finish, start_ranks

WORKER = "tests.support.fsdp_worker"


def gradients(folder, ranks):
    output, log = folder / f"{ranks}.pt", folder / f"log{ranks}"
    finish(*start_ranks([WORKER, output, ranks], log, ranks), log=log)
    return torch.load(output, weights_only=True)


def test_two_sharded_processes_equal_one(tmp_path):
    one, two = gradients(tmp_path, 1), gradients(tmp_path, 2)
    cases = {f"{head} {mode}" for head in ("tied", "untied") for mode in ("at once", "recomputed")}
    layers = {f"untied at once, layers: {layers}" for layers in ("all", 2, "op")}
    assert set(one) == set(two) == cases | layers
    for case in layers:
        for found in (one, two):
            for name, gradient in found["untied at once"].items():
                assert torch.equal(found[case][name], gradient), (case, name)
    for case, expected in one.items():
        assert set(expected) == set(two[case])
        assert any("lm_head" in name for name in expected) == case.startswith("untied")
        for name, gradient in expected.items():
            assert gradient.norm() > 0
            assert (two[case][name] - gradient).norm() / gradient.norm() < 2e-6, (case, name)
