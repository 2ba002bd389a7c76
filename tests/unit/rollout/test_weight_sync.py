"""The stream of weights is the checkpoint that `save_pretrained` would write, whatever the student is made of."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pgpo_lightning.models.loading import load_model
from pgpo_lightning.models.lora import add_adapter
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.rollout.weight_sync import drained, stream_weights, write_weights
from tests.support.adapters import disturb, lora, matrices, with_product
from tests.support.architectures import tiny
from tests.support.helpers import tiny_model
from tests.support.model_kinds import MODELS

QUERY = "model.layers.0.self_attn.q_proj.weight"


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_moe", "mixtral", "gpt_oss", "gemma3_text", "granitemoehybrid", "lfm2"]
)
def test_names_shapes_and_values_are_those_of_a_checkpoint(tmp_path, name):
    """Of models whose experts are stored otherwise than they are computed, too."""
    model = tiny(name)
    expected, streamed = saved(model, tmp_path), dict(stream_weights(model))
    assert {*streamed} - {*expected} <= {"lm_head.weight"}  # tied: not in the file
    assert all(torch.equal(streamed[key], value) for key, value in expected.items())
    assert "lm_head.weight" in streamed


def test_it_is_cast_tensor_by_tensor():
    model = tiny_model()
    streamed = dict(stream_weights(model, torch.bfloat16))
    assert {tensor.dtype for tensor in streamed.values()} == {torch.bfloat16}
    assert torch.equal(streamed["model.norm.weight"], model.model.norm.weight.bfloat16())
    own = dict(stream_weights(model))
    assert own["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()  # nothing is copied without need


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_is_merged(targets):
    model = tiny_model()
    plain = copy.deepcopy(model)
    add_adapter(model, lora(target_modules=targets), seed=0)
    disturb(model)
    expected = with_product(plain, {name.replace(".base_layer", ""): value for name, value in matrices(model).items()})
    streamed = dict(stream_weights(model))
    assert [*streamed] == [*expected.state_dict()]
    for name, value in expected.state_dict().items():
        assert torch.allclose(streamed[name], value, atol=1e-6), name
    assert not torch.equal(streamed[QUERY], tiny_model().state_dict()[QUERY])
    base = dict(stream_weights(model, adapted=False))
    assert [*base] == [*streamed]
    assert all(torch.equal(base[name], value) for name, value in tiny_model().state_dict().items())


def test_an_adapter_is_merged_into_layers_that_are_not_linear_by_class():
    """GPT-2's matrices are `Conv1D`, stored as their transpose."""
    model = MODELS["gpt2"]()
    add_adapter(model, lora(), seed=0)
    disturb(model)
    name = "transformer.h.0.attn.c_attn"
    layer = model.get_submodule(name)
    inputs = torch.randn(3, model.config.n_embd)
    weights = dict(stream_weights(model))
    with torch.no_grad():
        expected = layer(inputs)
    torch.testing.assert_close(
        inputs @ weights[f"{name}.weight"] + weights[f"{name}.bias"], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_streamed_as_they_are_multiplied_with(tmp_path, bits):
    """One layer has an adapter and the others none; biases and quantisation constants are no weights of their own."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    quantised = load_model(str(tmp_path / "base"), "float32", quantization=Quantization(bits))
    add_adapter(quantised, lora(target_modules=["q_proj"]), seed=0)
    disturb(quantised)
    streamed = dict(stream_weights(quantised, torch.float32))
    assert {name: tensor.shape for name, tensor in streamed.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    inputs = torch.randn(3, model.config.hidden_size)
    for name in ("q_proj", "k_proj"):
        layer = quantised.model.layers[0].self_attn.get_submodule(name)
        with torch.no_grad():
            expected = layer(inputs)
        got = inputs @ streamed[f"model.layers.0.self_attn.{name}.weight"].T
        assert (got - expected).norm() / expected.norm() < {4: 1e-5, 8: 2e-2}[
            bits
        ]  # with 8 bits inputs are quantised too
    write_weights(quantised, tmp_path / "whole", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.state_dict()[QUERY], streamed[QUERY])


def test_a_failing_reader_leaves_nothing_in_the_stream():
    stream = iter(range(5))

    def read():
        with drained(stream) as items:
            next(items)
            raise KeyError

    with pytest.raises(KeyError):
        read()
    assert [*stream] == []
