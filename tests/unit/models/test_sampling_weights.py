"""16-bit copies for sampling: the same products, logits in fp32, and nothing left behind."""

import pytest
import torch

from pgpo_lightning.models.cast_weights import cast_weights
from pgpo_lightning.models.decoding import WAYS
from pgpo_lightning.models.lm_head import decoder, source
from pgpo_lightning.models.lora import add_adapter
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.models.sampling_weights import sampling_weights, wide_logits
from tests.support.adapters import disturb, lora
from tests.support.architectures import tiny
from tests.support.helpers import random_rows, tiny_model

IDS = torch.arange(6, 30).view(2, 12)
CPU = torch.device("cpu")


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype, cache_enabled=False)


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_compute_the_same_to_the_last_bit_without_a_cast(adapted):
    model = tiny_model().eval()
    if adapted:
        add_adapter(model, lora(), 0)
        disturb(model)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad(), autocast():
        expected = decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state
        with sampling_weights(model):
            types = {p.dtype for name, p in model.named_parameters() if "_proj" in name}
            assert types == {torch.bfloat16}
            assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.float32
            assert torch.equal(decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state, expected)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: own for name, (own, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_of_experts_what_autocast_casts_is_copied(experts):
    model = tiny("qwen3_moe")
    model.set_experts_implementation(experts)
    with torch.no_grad(), autocast():
        expected = decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state
        with sampling_weights(model):
            copied = {
                name.split(".")[-2]
                for name, p in model.named_parameters()
                if p.dtype == torch.bfloat16 and "mlp" in name
            }
            assert torch.equal(decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state, expected)
    # transformers leaves the grouped product in the type of the weights.
    assert copied == ({"gate"} if experts == "grouped_mm" else {"gate", "experts"})


@pytest.mark.parametrize("twice", ["another product", "a later token"])
def test_a_weight_that_is_read_in_another_way_too_is_not_copied(twice):
    model = tiny("gpt2")
    projection = model.transformer.h[0].mlp.c_fc
    with torch.no_grad(), autocast():
        assert (projection, "weight") in cast_weights(model, torch.bfloat16)
        model = tiny("gpt2")
        projection = model.transformer.h[0].mlp.c_fc

        def exactly(module, args):
            if twice == "another product" or args[0].size(1) == 1:
                module.seen = module.weight.sum()

        projection.register_forward_pre_hook(exactly)
        found = cast_weights(model, torch.bfloat16)
    assert (projection, "weight") not in found
    assert (model.transformer.h[1].mlp.c_fc, "weight") in found


def test_the_weights_are_back_after_an_error():
    model = tiny_model()
    own = list(model.parameters())
    with pytest.raises(KeyError), autocast(), sampling_weights(model):
        raise KeyError
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_without_autocast_nothing_is_copied():
    model = tiny_model()
    own = list(model.parameters())
    with sampling_weights(model):
        assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert wide_logits(model) is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixed", [True, False])
def test_the_sampler_reads_logits_as_the_loss_does(way, mixed):
    """The model rounds its logits to bf16, which is most of the train-inference mismatch."""
    model = tiny_model(tie_word_embeddings=False).eval()
    model.lm_head.weight.data.mul_(10)  # logits of the size of a trained model's
    if not mixed:
        model.to(torch.bfloat16)
    pairs = [(row.rollout.prompt_ids, row.rollout.response_ids[:1]) for row in random_rows(6)]
    with torch.no_grad(), autocast() if mixed else torch.autocast("cpu", enabled=False):
        read = wide_logits(model)
        states = source(model, Sequences.pack(pairs, 0, CPU))
        expected = read(states.hidden).log_softmax(-1)
        rounded = model.lm_head(states.hidden).float().log_softmax(-1)
        with sampling_weights(model):
            sampled = way.start(model, [prompt for prompt, _ in pairs], 1, 4).logits.log_softmax(-1)
    assert sampled.dtype == torch.float32
    ours, models = ((each - expected).abs().mean() for each in (sampled, rounded))
    assert models > 5e-3
    assert ours < models / 3, (ours, models)
