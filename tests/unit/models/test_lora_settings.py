"""Settings of adapters and quantisation that do not fit are refused by name."""

import importlib.util

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.models.lora import add_adapter, write_adapter
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.modules import SDPO
from tests.support.adapters import lora, matrices
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    half_right,
    tiny_model,
    tiny_sdpo,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "Expected `lora.r` to be at least 1, but got 0"),
        ({"lora_alpha": 0}, "Expected `lora.lora_alpha` to be at least 1, but got 0"),
        ({"target_modules": []}, r"Expected `lora.target_modules` not to be empty, but got \[\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "`lora.target_modules` without embeddings and language-model head"),
        ({"target_modules": ["embed_tokens"]}, "`lora.target_modules` without embeddings and language-model head"),
        ({"target_modules": ["q_proj", "query"]}, "`lora.target_modules` to name layers of Qwen3.*it has no query"),
        ({"target_modules": "nothing.*"}, "Expected `lora.target_modules` to name linear layers"),
        ({"target_modules": ["input_layernorm"]}, "Expected `lora.target_modules` to name linear layers"),
        (
            {"adapter": "no/such"},
            "Expected `lora.adapter` to be a folder with adapter_model.safetensors, but got no/such",
        ),
    ],
    ids=str,
)
def test_settings_of_an_adapter_that_do_not_fit_are_refused(settings, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        tiny_sdpo(lora=lora(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 8}, "`r` 4 instead of 8"), ({"target_modules": ["q_proj"]}, "other layers than `target_modules` names")],
    ids=str,
)
def test_an_adapter_to_start_from_that_is_another_is_refused(tmp_path, settings, message):
    before = tiny_sdpo(lora=lora())
    write_adapter(tmp_path, matrices(before.model), before.student.identity)
    with pytest.raises(MisconfigurationException, match=f"Expected the adapter in `lora.adapter` .*{message}"):
        tiny_sdpo(lora=lora(adapter=str(tmp_path), **settings))


def test_settings_that_contradict_each_other_are_refused(monkeypatch):
    def make(model, **settings):
        build(SDPO, model, half_right, tokenizer=TOKENIZER, **LIMITS, **settings)

    with pytest.raises(ValueError, match="Expected `lora` with `quantization`"):
        make("toy", quantization=Quantization())
    with pytest.raises(ValueError, match="Expected `model` to be a folder or Hub id with `quantization`"):
        make(tiny_model(), lora=lora(), quantization=Quantization())
    wrapped = tiny_sdpo(lora=lora()).model
    with pytest.raises(ValueError, match="Expected `model` to be a base model with `lora`, but got Qwen3ForCausalLM"):
        make(wrapped, lora=lora())
    with pytest.raises(ValueError, match="Expected `model` to be without an adapter of its own"):
        make(wrapped)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(MisconfigurationException, match=r"pip install 'pgpo-lightning\[peft\]'"):
        make("toy", lora=lora())
    make("toy")


def test_a_peft_that_is_too_old_for_transformers_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "peft-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MisconfigurationException, match=r"Expected peft 0\.\d+\.\d+ or newer.*but peft 0\.1\.0 is installed"
    ):
        build(SDPO, "no/such/model", half_right, tokenizer=TOKENIZER, lora=lora(), **LIMITS)


def test_what_peft_refuses_for_another_reason_is_not_put_down_to_target_modules():
    model = tiny_sdpo(lora=lora()).model
    with pytest.raises(MisconfigurationException, match=r"adapter to Qwen3ForCausalLM.*already exists") as error:
        add_adapter(model, lora(), seed=0)
    assert "target_modules" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2}, "Expected `quantization.bits` to be one of 4, 8, but got 2"),
        (
            {"bnb_4bit_quant_type": "nf5"},
            "`quantization.bnb_4bit_quant_type` to be one of nf4, fp4 or null, but got 'nf5'",
        ),
        ({"bits": 8, "bnb_4bit_quant_type": "fp4"}, "Expected no `quantization.bnb_4bit_quant_type` with 8 bits"),
        ({"bits": 8, "bnb_4bit_use_double_quant": True}, "Expected no `quantization.bnb_4bit_use_double_quant` with 8"),
    ],
    ids=str,
)
def test_settings_of_a_quantization_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**settings)
