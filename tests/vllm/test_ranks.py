"""vLLM in every rank's process: under DDP and FSDP2, for all weights and an adapter. Run by `make test-vllm`."""

from itertools import product

import pytest
import torch

from tests.support.processes import finish, start_ranks

pytestmark = pytest.mark.timeout(900)
WORKER = "tests.support.vllm_ranks_worker"


def run(folder, strategy, what):
    output, log = folder / "found", folder / "log"
    finish(*start_ranks([WORKER, output, strategy, what], log, 2), log=log, seconds=600)
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("strategy", "what"),
    [*product(("ddp", "fsdp2"), ("whole", "lora", "adapter")), ("fsdp2", "shared")],
)
def test_every_rank_samples_from_its_own_weights_at_every_step(tmp_path, strategy, what):
    ranks = run(tmp_path, strategy, what)
    first, second = (found["recorded"] for found in ranks)
    assert len(first) == len(second) == 3
    for (gap, ours), (other_gap, theirs) in zip(first, second, strict=True):
        assert max(gap, other_gap) < 1e-4
        assert sum(a == b for a, b in zip(ours, theirs, strict=True)) < 2  # the ranks sample differently
    assert [found["syncs"] for found in ranks] == [4, 4]  # three steps, and the evaluation at the end
    assert ranks[0]["score"] == ranks[1]["score"]


@pytest.mark.parametrize(
    ("strategy", "what", "limit"),
    [("ddp", "stale", "0.1"), ("fsdp2", "stale", "0.1"), ("fsdp2", "stale-lora", "0.0001")],
)
def test_stale_weights_stop_the_run_at_the_second_step(tmp_path, strategy, what, limit):
    ranks = start_ranks([WORKER, tmp_path / "found", strategy, what], tmp_path / "log", 2)
    for rank in ranks:
        rank.join(600)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    texts = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert codes == [1, 1], texts[0][-3000:]
    for text in texts:
        assert f"`mismatch.max_sampler_gap`={limit} nats per token" in text
        assert "at step 1: the rollouts" in text


def test_a_rank_that_dies_ends_the_other(tmp_path):
    ranks = start_ranks([WORKER, tmp_path / "found", "fsdp2", "dies"], tmp_path / "log", 2)
    for rank in ranks:
        rank.join(600)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [1, 3], (tmp_path / "log.0").read_text()[-3000:]
