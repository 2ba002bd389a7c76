"""Sampling on a pretended GPU: how often the host waits for it, and what is computed again for every token."""

import pytest
import torch

from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.models.soundness import way_to_sample
from pgpo_lightning.rollout import transformers_engine
from tests.support.architectures import tiny
from tests.support.helpers import TOKENIZER, tiny_model
from tests.support.pretended_gpu import NAME, counting
from tests.support.pretended_gpu.fixture import take_for_gpu
from tests.support.sampling import ending_model, generate, prompts_of, responses


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    take_for_gpu(monkeypatch)


def decoding(monkeypatch, lengths, precision=torch.float32, model=None, tokens=33):
    """What it takes to decode so many tokens of two responses to each prompt, none of which ends."""
    monkeypatch.setattr(transformers_engine, "end_tokens", lambda *_: {10**9})
    model = (model or tiny_model(tie_word_embeddings=False)).to(NAME)
    prompts = prompts_of(*lengths)
    way_to_sample(model, 64)
    with counting() as counts, torch.autocast(NAME, precision, enabled=precision != torch.float32, cache_enabled=False):
        generate(model, prompts, 2, max_tokens=tokens)
    return counts


def per_token(monkeypatch, *settings):
    """Waits, operations and elements of weights that were cast, per token: of 32 tokens more."""
    long, short = (decoding(monkeypatch, *settings, tokens=tokens) for tokens in (49, 17))
    return tuple(
        (getattr(long, name).total() - getattr(short, name).total()) / 32 for name in ("waits", "operations", "cast")
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 9, 3)])
def test_the_host_waits_at_most_once_in_sixteen_tokens_and_no_weight_is_cast(lengths, precision, monkeypatch):
    waits, operations, cast = per_token(monkeypatch, lengths, precision)
    assert 0 < waits <= 1 / 16
    assert cast == 0
    assert operations < (150 if precision == torch.float32 else 190)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral"])
def test_nor_does_it_with_sliding_windows(name, monkeypatch):
    waits, _, _ = per_token(monkeypatch, (5, 9, 3), torch.float32, tiny(name, vocab_size=len(TOKENIZER)))
    assert 0 < waits <= 1 / 16


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_no_weight_of_an_expert_is_cast(experts, monkeypatch):
    model = tiny("qwen3_moe", vocab_size=len(TOKENIZER))
    model.set_experts_implementation(experts)
    settings = (5, 9, 3), torch.bfloat16, model
    decoding(monkeypatch, *settings)  # the trial casts them
    assert per_token(monkeypatch, *settings)[2] == 0
    monkeypatch.setattr("pgpo_lightning.models.sampling_weights.cast_weights", lambda *_: [])
    assert per_token(monkeypatch, *settings)[2] > 1024


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_nor_does_it_with_a_recurrent_state(name, monkeypatch):
    waits, _, _ = per_token(monkeypatch, (5, 9, 3), torch.float32, tiny(name, vocab_size=len(TOKENIZER)))
    assert 0 < waits <= 1 / 16


def test_long_prompts_are_shared_with_fp32_scores(monkeypatch):
    monkeypatch.setattr("pgpo_lightning.models.shared_decoding._LONG_ON_GPU", 1)
    waits, operations, cast = per_token(monkeypatch, (5, 9, 3), torch.bfloat16)
    assert 0 < waits <= 1 / 16
    assert cast == 0
    assert operations < 220


def test_a_look_at_every_token_is_found(monkeypatch):
    draw = transformers_engine._draw

    def looking(weights, uniform):
        assert weights.sum().item() > 0
        return draw(weights, uniform)

    monkeypatch.setattr(transformers_engine, "_draw", looking)
    assert per_token(monkeypatch, (5, 5, 5))[0] > 1


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_are_deterministic_where_that_is_wanted_and_those_of_the_cpu(top_p, monkeypatch):
    model, prompts = ending_model(), prompts_of(5, 9, 3)
    seeds = [derive_seed("question", i) for i in range(3)]
    expected = responses(generate(model, prompts, n=4, seeds=seeds, top_p=top_p))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    way_to_sample(model.to(NAME), 64)
    torch.use_deterministic_algorithms(True)
    try:
        assert responses(generate(model, prompts, n=4, seeds=seeds, top_p=top_p)) == expected
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.ones(3, device=NAME).cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)
