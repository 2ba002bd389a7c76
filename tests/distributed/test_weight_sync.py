"""Every rank streams the whole model's weights out of a sharded one, and no rank waits for one that failed."""

import pytest
import torch
from safetensors.torch import load_file

from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lora import write_current_adapter
from pgpo_lightning.rollout.weight_sync import stream_weights
from tests.support.helpers import tiny_model
from tests.support.processes import finish, start_ranks
from tests.support.stream_worker import student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def ranks(folder):
    finish(
        *start_ranks(["tests.support.stream_worker", folder / "found"], folder / "log", 2),
        log=folder / "log",
        seconds=120,
    )
    found = [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]
    return [*found, load_file(folder / "written" / "model.safetensors")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_stream_is_that_of_the_whole_model(ranks, adapted, precision, dtype):
    expected = dict(stream_weights(student(adapted), dtype))
    assert {*expected} == {*tiny_model().state_dict()}
    for found in ranks[:2]:
        streamed = found[f"{adapted} {precision} {dtype}"]
        assert [*streamed] == [*expected]
        for name, tensor in expected.items():
            assert streamed[name].dtype == tensor.dtype
            assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_adapter_alone_is_the_whole_one_on_every_rank_beside_the_base_weights(ranks, folder, precision):
    write_current_adapter(student(True), folder / "expected", torch.bfloat16)
    expected = load_file(folder / "expected" / "adapter_model.safetensors")
    assert len(expected) == len(adapter(student(True)))
    base = dict(stream_weights(tiny_model()))
    for rank, found in enumerate(ranks[:2]):
        written = load_file(folder / f"adapter {precision} {rank}" / "adapter_model.safetensors")
        for ours, theirs in ((written, expected), (found[f"base {precision}"], base)):
            assert [*ours] == [*theirs]
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), name
        before, after = found[f"base sums {precision}"]
        assert before == after  # a change of the adapter is none of the base


def test_sharded_weights_are_narrowed_without_the_buffers(ranks):
    for found in ranks[:2]:
        assert found["weight"] == "torch.bfloat16"
        assert found["buffers"]
        assert {*found["buffers"].values()} == {"torch.float32"}


def test_a_reader_that_fails_on_one_rank(ranks):
    assert all(found["failed"] for found in ranks[:2])


def test_all_ranks_see_a_change_of_one_rank(ranks):
    first, second, _ = ranks
    assert first["sums"] == second["sums"]
    before, after = first["sums"]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_the_first_rank_writes_what_all_gathered(ranks):
    written = ranks[2]
    expected = dict(stream_weights(tiny_model(), torch.bfloat16))
    assert {*written} == {*expected}
    moved = {name for name, tensor in written.items() if not torch.equal(tensor, expected[name])}
    assert moved == {"model.norm.weight"}
