"""Strategies and settings that cannot train right are refused."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, tiny_sdpo


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FSDPStrategy, "got FSDPStrategy: FSDP1 has no weights outside .* Take FSDP2"),
        # It needs a package to be made, and passes for DDP, of which it is a subclass.
        (
            DeepSpeedStrategy,
            "got DeepSpeedStrategy: its engine keeps gradients .* ddp with bitsandbytes.optim.AdamW8bit",
        ),
        (Strategy, "got Strategy: gradients would not be exchanged"),
    ],
)
def test_a_strategy_under_which_steps_would_be_wrong_is_refused(strategy, why):
    module = tiny_sdpo()
    strategy = strategy() if strategy is FSDPStrategy else Mock(spec=strategy)
    module._trainer = SimpleNamespace(global_step=0, strategy=strategy, precision_plugin=None, datamodule=None)
    with pytest.raises(MisconfigurationException, match=rf"ModelParallelStrategy \(FSDP2\), but {why}"):
        module.setup("fit")


def test_tensor_parallelism_is_refused():
    module = tiny_sdpo()
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    module._trainer = SimpleNamespace(global_step=0, strategy=strategy, precision_plugin=None, datamodule=None)
    with pytest.raises(
        MisconfigurationException, match=r"`tensor_parallel_size` of 1.*but got 2.*`data_parallel_size`"
    ):
        module.setup("fit")


def test_a_quantised_base_with_sharded_weights_is_refused():
    pytest.importorskip("peft")
    given = {"lora": LoRA(), "quantization": Quantization()}
    module = build(SDPO, "toy", half_right, tokenizer=TOKENIZER, **given, **LIMITS)
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    module._trainer = SimpleNamespace(global_step=0, strategy=strategy, precision_plugin=None, datamodule=None)
    with pytest.raises(
        MisconfigurationException, match=r"no `quantization` with sharded weights, .*Set `quantization` to null"
    ):
        module.setup("fit")
