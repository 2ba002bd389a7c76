"""Models and precisions that cannot be sharded are refused."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from pgpo_lightning.distributed.fsdp import FullySharded
from tests.support.helpers import tiny_model, tiny_sdpo


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


def test_an_evaluation_with_sharded_weights_takes_a_checkpoint_whose_weights_are_loaded_already():
    module = tiny_sdpo()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.teacher, module.steps = None, 7
    module.on_load_checkpoint(checkpoint)
    assert module.steps == 0
    assert "state_dict" not in checkpoint
