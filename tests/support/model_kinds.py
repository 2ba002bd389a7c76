"""Tiny models of several architectures, by name."""

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.support.helpers import TOKENIZER, tiny_model

SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


MODELS = {
    "qwen3 tied": lambda: tiny_model(tie_word_embeddings=True),
    "qwen3 untied": lambda: tiny_model(tie_word_embeddings=False),
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=1.5, sliding_window=8)),
    "gemma2 uncapped": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=None)),
    "cohere": lambda: build(
        CohereForCausalLM, CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.0625)
    ),
    "granite": lambda: build(
        GraniteForCausalLM, GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0)
    ),
    "gpt2": lambda: build(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1),
    ),
}
