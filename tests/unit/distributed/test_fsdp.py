"""Models and precisions that cannot be sharded are refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pgpo_lightning.distributed.fsdp import FullySharded, full_tensor
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.training.configs import UpdateConfig
from pgpo_lightning.training.mini_batches import Pass
from pgpo_lightning.training.start_up import check_combination, check_optimizer_fits, gathers_checkpoints
from tests.support.helpers import random_rows, tiny_model, tiny_sdpo


def test_a_precision_that_scales_gradients_is_refused():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(
        MisconfigurationException, match=r"bf16-mixed or bf16-true with sharded weights, but got 16-mixed"
    ):
        FullySharded(tiny_model(), None, None, precision)


def test_a_model_without_named_layers_is_refused():
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(
        MisconfigurationException, match=r"Qwen3ForCausalLM to name its layers .* `trainer.strategy` to ddp"
    ):
        FullySharded(model, None, None, Precision())


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_are_reduced_in_every_pass_or_in_the_last_with_the_same_result(mesh, narrow):
    found = {}
    for reduce in (True, False, None):
        module = tiny_sdpo(model=tiny_model(), teacher_regularization="live", **{"update.reduce_every_pass": reduce})
        learner, seen = module.learner, []
        learner.placement = FullySharded(
            module.model, None, mesh, HalfPrecision("bf16-true") if narrow else Precision()
        )
        learner.passes = lambda samples, *_: [Pass(samples[:3], counts=True), Pass(samples[3:], counts=True)]

        def backward(loss, seen=seen, model=module.model):
            loss.backward()
            seen.append(sum(parameter.grad is not None for parameter in model.parameters()))

        learner.accumulate(random_rows(5), backward)
        found[reduce] = torch.cat([full_tensor(p.grad).flatten().float() for p in module.model.parameters()])
        everything = sum(1 for _ in module.model.parameters())
        assert seen == [everything if reduce or (reduce is None and not narrow) else 0, everything]
    torch.testing.assert_close(found[True], found[False], rtol=0.02 if narrow else 1e-5, atol=2e-3 if narrow else 1e-7)
    assert torch.equal(found[None], found[not narrow])


def test_reducing_gradients_in_every_pass_is_refused_without_shards():
    with pytest.raises(MisconfigurationException, match=r"no `update.reduce_every_pass` without .* Set it to null"):
        check_combination(TransformersEngine(), None, sharded=False, update=UpdateConfig(reduce_every_pass=True))


def test_an_evaluation_with_sharded_weights_takes_a_checkpoint_whose_weights_are_loaded_already():
    module = tiny_sdpo()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.teacher, module.steps = None, 7
    module.on_load_checkpoint(checkpoint)
    assert module.steps == 0
    assert "state_dict" not in checkpoint


@pytest.mark.parametrize("rows", [239, 240])
def test_quantised_state_of_unequal_shards_is_not_gathered_into_one_file(rows):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        shards = distribute_tensor(
            torch.zeros(rows, 128), dist.init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None
        )
        model = torch.nn.ParameterDict({"embedding": torch.nn.Parameter(shards)})
        quantised = type("AdamW8bit", (torch.optim.SGD,), {"__module__": "torchao.optim.adam", "block_size": 256})
        optimizer = quantised(model.parameters(), lr=1.0)
        check_optimizer_fits(optimizer, model, sharded=True)  # every rank writes its own
        check_optimizer_fits(torch.optim.AdamW(model.parameters()), model, sharded=True, gathered=True)
        refused = pytest.raises(MisconfigurationException, match=r"checkpoint` true .* of embedding \(239, 128\)")
        with refused if rows == 239 else nullcontext():
            check_optimizer_fits(optimizer, model, sharded=True, gathered=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("whole", [True, False])
def test_who_writes_checkpoints_of_shards(whole):
    strategy = ModelParallelStrategy(save_distributed_checkpoint=not whole)
    assert gathers_checkpoints(SimpleNamespace(strategy=strategy)) == whole
    assert not gathers_checkpoints(None)
