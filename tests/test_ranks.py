"""Two processes are one: equal weights, and one information estimate that is the true mean over all rows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LIMITS, TOKENIZER, half_right, tiny_model, tiny_sdpo
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from processes import finish, start_ranks

from pgpo_lightning.lora import LoRA
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout import TransformersEngine

WORKER = Path(__file__).parent / "ranks_worker.py"


def run(folder, ranks, split, strategy="one", teacher="ema"):
    output, log = folder / f"out{ranks}", folder / f"log{ranks}"
    finish(*start_ranks([WORKER, output, ranks, split, strategy, teacher], log, ranks), log=log)
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("split", "strategy", "teacher"),
    [
        ("uneven", "ddp", "ema"),
        ("one-sided", "ddp", "ema"),
        ("uneven", "fsdp2", "trust-region"),
        ("one-sided", "fsdp2", "ema"),
        ("routed", "ddp", "restart"),
        ("routed", "fsdp2", "gated"),
    ],
)
def test_two_processes_equal_one(tmp_path, split, strategy, teacher):
    (one,), two = run(tmp_path, 1, split, teacher=teacher), run(tmp_path, 2, split, strategy, teacher)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert torch.equal(two[0]["teacher"], two[1]["teacher"])
    assert two[0]["seen"] == two[1]["seen"]
    torch.testing.assert_close(torch.tensor(two[0]["seen"]), torch.tensor(one["seen"]), rtol=1e-3, atol=1e-6)
    assert len({rho for *_, rho in one["seen"]}) == 3, "the multiplier must move for the comparison to mean anything"
    # Adam divides by the gradient's size, so a rounding difference of a tiny gradient can show: compare in the mean too.
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=0, atol=3e-4)
    assert (two[0]["weights"] - one["weights"]).abs().mean() < 1e-6


def test_a_strategy_that_would_not_exchange_gradients_is_refused():
    module = tiny_sdpo()
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=None, datamodule=None)
    with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy \(FSDP2\), but got FSDPStrategy"):
        module.setup("fit")


def test_tensor_parallelism_is_refused():
    module = tiny_sdpo()
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    module._trainer = SimpleNamespace(strategy=strategy, precision_plugin=None, datamodule=None)
    with pytest.raises(
        MisconfigurationException, match=r"`tensor_parallel_size` of 1.*but got 2.*`data_parallel_size`"
    ):
        module.setup("fit")


class OwnWeights(TransformersEngine):
    has_weights = True


@pytest.mark.parametrize(
    ("settings", "sharded", "message"),
    [
        ({"lora": LoRA()}, True, "no `lora` with sharded weights, but got ModelParallelStrategy"),
        ({"engine": OwnWeights()}, True, "no sharded weights with OwnWeights"),
        ({"engine": OwnWeights(), "lora": LoRA()}, False, "no `lora` with OwnWeights"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, sharded, message):
    pytest.importorskip("peft")
    module = SDPO(tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS | settings)
    strategy = ModelParallelStrategy() if sharded else SingleDeviceStrategy("cpu")
    if sharded:
        strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    module._trainer = SimpleNamespace(strategy=strategy, precision_plugin=None, datamodule=None)
    with pytest.raises(MisconfigurationException, match=message):
        module.setup("fit")
