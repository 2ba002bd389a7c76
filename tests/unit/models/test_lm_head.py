"""The head that is applied by hand gives the model's own logits, or the model is refused."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import (
    Qwen3ForCausalLM,
)

from pgpo_lightning.models.lm_head import check_head, decoder, head
from tests.support.architectures import tiny
from tests.support.helpers import TOKENIZER, tiny_model
from tests.support.model_kinds import MODELS


def token_ids(rows, length, seed=0):
    return torch.randint(5, len(TOKENIZER), (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_logits_of_the_model(name):
    model = MODELS[name]().eval()
    ids = token_ids(2, 9)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head(model)(hidden), logits, rtol=1e-5, atol=1e-6)
        bare = model.get_output_embeddings()(hidden)
    if name in ("gemma2", "cohere", "granite"):  # else the case would prove nothing
        assert (bare - logits).abs().max() > 0.1 * bare.abs().max()
    check_head(model)


def test_head_takes_hidden_states_of_another_type():
    model = tiny_model().to(torch.bfloat16)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    logits = head(model)(hidden)
    assert logits.shape == (3, len(TOKENIZER))
    torch.testing.assert_close(logits, hidden.to(torch.bfloat16) @ model.lm_head.weight.T)


class Doubling(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("training", [False, True])
def test_check_head_finds_what_it_does_not_know(training):
    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match=r"logits of Doubling .* differ by [0-9.]+\. .* not supported"):
        check_head(Doubling(tiny_model().config))  # whose logits at initialization are small
    model = tiny_model(attention_dropout=0.5).train(training)
    check_head(model)
    assert model.training == training
    assert model.model.layers[1].training == training


def test_check_head_finds_a_bias_that_is_not_in_the_embedding():
    model = tiny_model()
    bias = torch.linspace(-0.1, 0.1, len(TOKENIZER))
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits + bias))
    with pytest.raises(MisconfigurationException, match="differ by"):
        check_head(model)


def test_the_decoder_is_found_where_it_has_another_name():
    model = tiny("llama4_text")
    assert model.get_decoder() is model  # what transformers finds
    assert decoder(model) is model.model
    check_head(model)


@pytest.mark.parametrize("name", ["modernbert-decoder", "roberta", "inkling_text"])
def test_a_head_that_does_more_is_refused_in_one_line(name):
    model = tiny(name)
    with pytest.raises(MisconfigurationException, match=rf"logits of {type(model).__name__} .* not supported") as error:
        check_head(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [TypeError("unexpected\nargument"), AttributeError("no attribute 'x'")])
def test_what_cannot_even_be_run_is_refused_in_one_line(fault):
    model = tiny_model()

    def fail(*_):
        raise fault

    model.model.register_forward_pre_hook(fail)
    with pytest.raises(
        MisconfigurationException, match=rf"Qwen3ForCausalLM .* raised {type(fault).__name__}: "
    ) as error:
        check_head(model)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is fault


@pytest.mark.parametrize("where", [slice(None), 7])
def test_weights_that_are_not_finite_are_named(where):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[where] = float("nan")
    with pytest.raises(MisconfigurationException, match="Expected finite logits from Qwen3ForCausalLM"):
        check_head(model)


def test_tokens_that_are_never_drawn_hide_nothing():
    model = tiny_model()

    def forbid(_, __, output):
        output.logits[..., 7] = -float("inf")
        output.logits[..., 8] += 0.1

    model.register_forward_hook(forbid)
    with pytest.raises(MisconfigurationException, match="differ by"):
        check_head(model)


@pytest.mark.parametrize("name", ["falcon_h1", "recurrent_gemma", "xlstm"])
def test_scales_and_caps_by_their_other_names(name):
    key = {"falcon_h1": "lm_head_multiplier", "recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap"}[
        name
    ]
    model = tiny(name, **{key: 0.37})
    bare = model.get_output_embeddings()(decoder(model)(token_ids(1, 5) % 96, use_cache=False).last_hidden_state)
    assert (
        head(model)(decoder(model)(token_ids(1, 5) % 96, use_cache=False).last_hidden_state) - bare
    ).abs().max() > 0.1
    check_head(model)
