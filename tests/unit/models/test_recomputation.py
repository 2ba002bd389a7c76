"""Selective recomputation changes what is held until the backward pass, and neither losses nor gradients."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.training.configs import ModelConfig, UpdateConfig
from tests.support.helpers import random_rows, tiny_model, tiny_sdpo


def step(how, narrow=False, dropout=0.0, **settings):
    """Loss and gradients of a step in several micro-batches."""
    model = tiny_model(num_hidden_layers=3, attention_dropout=dropout)
    settings = {"update": UpdateConfig(micro_batch_tokens=200)} | settings
    module = tiny_sdpo(model=model, model_config=how, **settings)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, narrow, cache_enabled=False):
        loss = module.learner.accumulate(random_rows(6)).loss
    return loss, torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"narrow": True, "teacher": TeacherConfig("frozen", offload=True)},
        {"dropout": 0.5, "teacher_regularization": "live"},
        {"lora": LoRA(r=4)},
        {"update": UpdateConfig(padding_free=True, micro_batch_tokens=200)},
    ],
    ids=["plain", "bf16-mixed, offloaded teacher", "dropout", "adapter", "padding-free"],
)
def test_gradients_are_those_of_whole_layers_bit_for_bit_and_those_without_recomputation(settings):
    whole, gradient = step(ModelConfig(gradient_checkpointing=True), **settings)
    if not settings.get("dropout"):  # without recomputation prompts are shared, which draws otherwise
        kept, expected = step(ModelConfig(), **settings)
        assert whole == pytest.approx(kept, rel=1e-2 if settings.get("narrow") else 1e-5)
        assert (gradient - expected).norm() < (0.05 if settings.get("narrow") else 1e-4) * expected.norm()
    for selection in (2, "op"):
        loss, found = step(ModelConfig(gradient_checkpointing=True, selective_ac_option=selection), **settings)
        assert loss == whole
        assert torch.equal(found, gradient), selection


def test_every_second_layer_holds_half_and_op_what_products_return():
    live = {}
    for selection in ("none", None, 2, "op"):
        model = tiny_model(num_hidden_layers=4).train()
        if selection != "none":
            recompute_activations(model, selection)
        with LiveBytes() as counter:
            hidden = model.model(input_ids=torch.ones(2, 30, dtype=torch.int64), use_cache=False).last_hidden_state
        live[selection] = counter.live
        assert hidden.requires_grad
    assert live[2] - live[None] == pytest.approx((live["none"] - live[None]) / 2, rel=1e-3)
    # Of every token and layer, in fp32: seven products, the attention, and one number per head that its backward pass reads.
    products = 32 + 16 + 16 + 32 + 64 + 64 + 32
    assert live["op"] - live[None] == 4 * 2 * 30 * 4 * (products + 32 + 2)


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"selective_ac_option` to be at most the 2 layers of Qwen3.* but got 3"
    ):
        recompute_activations(tiny_model(), 3)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"Expected `model_config.gradient_checkpointing` true with .*_option` op, .* got false"
    ):
        ModelConfig(selective_ac_option="op")
